"""Interlaced pictures -> whole pictures, at the same times.

In: decoded pictures in presentation order, with their ticks. Out: as many pictures with the same ticks;
those flagged as interlaced have the lines of one field rebuilt by FFmpeg's bwdif, the others are passed
on as they are. bwdif looks at the pictures just before and after, so wanted pictures need their
neighbours decoded (`with_neighbours`) and come out one picture late; in exchange pictures far apart can
be done without all that lies between, and come out the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from fractions import Fraction

import av
from av.filter import Graph
from av.video.frame import VideoFrame

_SMALLEST = 16
"""Width and height. Smaller pictures pass as they are: bwdif wants 4 lines of every plane, and chroma
planes may have a quarter."""


def with_neighbours(wanted: Collection[int], pts: Sequence[int]) -> set[int]:
    """The ticks `wanted`, and those of the pictures just before and after each in `pts` (sorted)."""
    found = set(wanted)
    for before, tick, after in zip([None, *pts], pts, [*pts[1:], None], strict=False):
        if tick in wanted:
            found.update(near for near in (before, after) if near is not None)
    return found


class Deinterlacer:
    """bwdif over runs of adjacent pictures.

    A picture comes out as in a run over the whole stream if both its neighbours in `pts` were pushed
    around it. Without the one before, its missing lines are made from its own field alone.
    """

    def __init__(self, pts: Sequence[int]) -> None:
        self._next = dict(zip(pts, [*pts[1:], None], strict=False))
        self._graph: Graph | None = None
        self._shape: tuple[int, int, str] | None = None
        self._expected: int | None = None
        self._waiting: deque[int | None] = deque()
        """Ticks of the pictures in the graph; without a tick, to be dropped."""
        self.interlaced = False
        """Pictures flagged as interlaced have come in. They leave without the flag."""

    def push(self, tick: int, frame: VideoFrame) -> list[tuple[int, VideoFrame]]:
        """Take the picture of `tick`, give those that are ready. Where `tick` is not the next of the
        timeline, or size or format change, the pictures before it are finished first."""
        shape = (frame.width, frame.height, frame.format.name)
        self.interlaced |= frame.interlaced_frame
        ready = [] if (tick, shape) == (self._expected, self._shape) else self.flush()
        if min(frame.width, frame.height) < _SMALLEST:
            return [*ready, (tick, frame)]
        if self._graph is None:
            self._graph, self._shape = _graph(frame, "bwdif", "mode=send_frame:deint=interlaced"), shape
            if not frame.interlaced_frame:
                # bwdif distrusts the past until it has met an interlaced picture. Showing it one at once
                # makes each picture depend on its neighbours only, not on where the run began.
                self._graph.push(_flagged(frame))
                self._waiting.append(None)
        self._expected = self._next.get(tick)
        self._graph.push(frame)
        self._waiting.append(tick)
        return ready + self._pull()

    def flush(self) -> list[tuple[int, VideoFrame]]:
        """The pictures not given yet."""
        if self._graph is None:
            return []
        self._graph.push(None)
        ready = self._pull()
        self._graph = None
        self._waiting.clear()
        return ready

    def _pull(self) -> list[tuple[int, VideoFrame]]:
        assert self._graph is not None
        ready: list[tuple[int, VideoFrame]] = []
        while self._waiting:
            try:
                frame = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                break
            assert isinstance(frame, VideoFrame)
            if (tick := self._waiting.popleft()) is not None:
                ready.append((tick, frame))
        return ready


def _graph(frame: VideoFrame, filter_name: str, arguments: str) -> Graph:
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
    )
    graph.link_nodes(source, graph.add(filter_name, arguments), graph.add("buffersink")).configure()
    return graph


def _flagged(frame: VideoFrame) -> VideoFrame:
    """The same picture, flagged as interlaced."""
    graph = _graph(frame, "setfield", "mode=tff")
    graph.push(frame)
    flagged = graph.pull()
    assert isinstance(flagged, VideoFrame)
    return flagged
