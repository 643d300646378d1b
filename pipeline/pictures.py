"""Decoding wanted pictures of one clip: by plan, or in order.

In: packets, and one array per wanted picture. Out: the arrays filled, and an `Outcome` that says which
pictures came out and whether to believe them. The plan feeds the decoder only [key frame .. wanted
picture] of each group of pictures that holds a wanted one, and inside it drops pictures that nobody
refers to; in order, everything is decoded up to the last wanted picture. One thread: processes scale
better than decoder threads.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipeline.container import Video, check_pixels
from pipeline.normalize import Normalizer
from pipeline.packets import Packets
from schemas.config import LimitsConfig
from schemas.errors import ClipError


@dataclass
class Outcome:
    """What a decode gave; pictures are named by their tick."""

    intact: set[int] = field(default_factory=set)
    damaged: set[int] = field(default_factory=set)
    """Flagged by the decoder, or after an error and before the next clean key frame."""
    failed: set[int] = field(default_factory=set)
    """Whose packet raised an error, or was fed after one and before the next clean key frame."""
    out_of_order: bool = False
    """Pictures came out without a timestamp or with one not after the last."""
    doubt: str = ""
    """First reason to mistrust it, in words; empty if there is none."""


class PictureDecoder:
    """Decodes pictures of one open video into arrays, as often as needed."""

    def __init__(self, video: Video, packets: Packets, *, limits: LimitsConfig) -> None:
        self._decoder, self._packets, self._limits = video.decoder, packets, limits
        self._counted = not packets.timed

    def planned(self, homes: Mapping[int, np.ndarray], normalizer: Normalizer) -> Outcome:
        """Decode as little as possible to fill `homes` (tick -> [H, W, 3])."""
        if self._counted:
            return Outcome(doubt="its packets do not say when their pictures are shown")
        outcome = self._run(needed_spans(self._packets, homes), homes, normalizer, skip=True)
        missing = homes.keys() - outcome.intact - outcome.damaged
        if missing and not outcome.doubt:
            outcome.doubt = f"{len(missing)} of {len(homes)} wanted pictures did not come out by plan"
        return outcome

    def in_order(self, homes: Mapping[int, np.ndarray], normalizer: Normalizer) -> Outcome:
        """Decode from the first packet until every wanted picture is there intact, or to the end.

        Where pictures turn out to carry no usable times, the n-th to come out is the n-th of the timeline.
        """
        everything = [(0, len(self._packets.pts) - 1)]
        outcome = self._run(everything, homes, normalizer, skip=False)
        if outcome.out_of_order and not self._counted:
            self._counted = True
            outcome = self._run(everything, homes, normalizer, skip=False)
        return outcome

    def _run(
        self,
        spans: Sequence[tuple[int, int]],
        homes: Mapping[int, np.ndarray],
        normalizer: Normalizer,
        *,
        skip: bool,
    ) -> Outcome:
        outcome = Outcome()
        waiting = set(homes)
        pts, timeline = self._packets.pts, self._packets.timeline.pts
        feed = self._packets.read(spans)
        for first, last in spans:
            self._decoder.flush_buffers()
            # A flushed decoder forgets; the key frame at the head of the span is its fresh start.
            tainted, count, before = False, 0, None
            drain: list[tuple[int, Packet[VideoStream] | None]] = [(last, None)]
            for i, packet in chain(islice(feed, last - first + 1), drain):
                wanted = not skip or pts[i] in homes
                self._decoder.skip_frame = "DEFAULT" if wanted else "NONREF"
                try:
                    pictures = self._decoder.decode(packet)
                except MemoryError as error:
                    raise ClipError("limit_memory", f"no memory for a picture: {error}") from error
                except av.FFmpegError as error:
                    tainted = True
                    outcome.doubt = outcome.doubt or f"an undecodable packet: {error.strerror}"
                    pictures = []
                for picture in pictures:
                    check_pixels(picture.width, picture.height, self._limits)
                    tick = picture.pts
                    if self._counted:
                        tick = timeline[count] if count < len(timeline) else None
                    count += 1
                    if tick is None or (before is not None and tick <= before):
                        outcome.out_of_order = True
                        outcome.doubt = outcome.doubt or "its pictures come out with times out of order"
                        continue
                    before = tick
                    tainted = _tainted(picture, tainted)
                    (outcome.damaged if tainted else outcome.intact).add(tick)
                    if tainted:
                        outcome.doubt = outcome.doubt or "the decoder flags damaged pictures"
                    if tick in homes:
                        normalizer.convert(picture, homes[tick])
                        if not tainted:
                            waiting.discard(tick)
                if tainted and (tick := pts[i]) is not None:
                    outcome.failed.add(tick)
                if not skip and not waiting:
                    return outcome
        return outcome


def needed_spans(packets: Packets, wanted: Mapping[int, object]) -> list[tuple[int, int]]:
    """Runs of packets (first, last) that hold all that is needed to decode the pictures `wanted`.

    The start for a wanted picture is the last key packet at or before it in decode order that is also
    not after it in time: pictures that lead an open group refer to the group before.
    """
    pts = packets.pts
    keys = [i for i, key in enumerate(packets.keys) if key]
    found: list[tuple[int, int]] = []
    for i, tick in enumerate(pts):
        if tick is None or tick not in wanted:
            continue
        k = bisect.bisect_right(keys, i) - 1
        while k >= 0 and (key_tick := pts[keys[k]]) is not None and key_tick > tick:
            k -= 1
        start = keys[k] if k >= 0 else 0
        if found and start <= found[-1][1] + 1:
            found[-1] = (found[-1][0], i)
        else:
            found.append((start, i))
    return found


def _tainted(picture: VideoFrame, before: bool) -> bool:
    """Whether a picture is damaged, given whether the one before it was."""
    return picture.is_corrupt or (before and not picture.key_frame)
