"""Decoding wanted pictures of one clip: by plan, or in order.

In: an open file, and one array per wanted picture. Out: the arrays filled, and an `Outcome` that says
which pictures came out and whether to believe them. The plan feeds the decoder only [key frame ..
wanted picture] of each group of pictures that holds a wanted one, and inside it drops pictures that
nobody refers to; in order, everything is decoded up to the last wanted picture.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, islice
from typing import Protocol

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipeline.container import check_pixels
from pipeline.deinterlace import Deinterlacer, with_neighbours
from pipeline.media import Media
from pipeline.normalize import Normalizer
from pipeline.packets import Packets
from pipeline.timeline import Timeline
from schemas.config import LimitsConfig
from schemas.errors import ClipError

Receive = Callable[[int, VideoFrame], None]
"""What is done with a picture, given its tick."""


@dataclass
class Outcome:
    """What a decode gave; pictures are named by their tick."""

    intact: set[int] = field(default_factory=set)
    damaged: set[int] = field(default_factory=set)
    """Flagged by the decoder, or after an error and before the next clean key frame."""
    failed: set[int] = field(default_factory=set)
    """Whose packet raised an error, or was fed after one and before the next clean key frame."""
    num_fed: int = 0
    """Packets given to the decoder."""
    sars: set[Fraction] = field(default_factory=set)
    """Sample aspect ratios that the stream itself claims."""
    deinterlaced: bool = False
    """Lines of some picture were rebuilt."""
    out_of_order: bool = False
    """Pictures came out without a timestamp or with one not after the last."""
    doubt: str = ""
    """First reason to mistrust it, in words; empty if there is none."""

    def hidden(self, timeline: Timeline) -> set[int]:
        """The pictures of `timeline` that an `in_order` run to the end proved to be none."""
        return set(timeline.pts) - self.intact - self.damaged - self.failed


class Backend(Protocol):
    """Who decodes: this module by plan, or another library."""

    def planned(self, homes: Mapping[int, np.ndarray], normalizer: Normalizer) -> Outcome:
        """Fill `homes` (tick -> [H, W, 3]) as cheaply as it can, and say whether to believe it."""

    def in_order(self, homes: Mapping[int, np.ndarray], normalizer: Normalizer) -> Outcome:
        """Fill `homes` in the way to be believed, where `planned` is in doubt."""


class PictureDecoder:
    """Decodes pictures of one open file into arrays, as often as needed."""

    def __init__(self, media: Media, *, limits: LimitsConfig) -> None:
        self._media, self._packets, self._limits = media, media.packets, limits
        self._counted = not media.packets.timed
        self.deinterlace: Sequence[int] | None = None
        """Ticks of all pictures in order, to rebuild the lines of interlaced ones; None leaves them."""

    def planned(self, homes: Mapping[int, np.ndarray], normalizer: Normalizer) -> Outcome:
        """Decode as little as possible to fill `homes` (tick -> [H, W, 3])."""
        return self._by_spans(homes, _into(homes, normalizer), skip=True)

    def in_order(self, homes: Mapping[int, np.ndarray], normalizer: Normalizer) -> Outcome:
        """Decode from the first packet until every wanted picture is there intact, or to the end.

        Where pictures turn out to carry no usable times, the n-th to come out is the n-th of the timeline.
        """
        return self._from_start(homes, _into(homes, normalizer))

    def every(self, ticks: Collection[int], receive: Receive) -> Outcome:
        """Decode the pictures `ticks` one after the other, each into `receive`; where that meets a doubt,
        once more from the first packet."""
        outcome = self._by_spans(ticks, receive, skip=False)
        return self._from_start(ticks, receive) if outcome.doubt else outcome

    def _by_spans(self, wanted: Collection[int], receive: Receive, *, skip: bool) -> Outcome:
        if self._counted:
            return Outcome(doubt="its packets do not say when their pictures are shown")
        needed = self.needed(wanted)
        outcome = self._run(needed_spans(self._packets, needed), needed, wanted, receive, skip=skip)
        missing = needed - outcome.intact - outcome.damaged
        if missing and not outcome.doubt:
            outcome.doubt = f"{len(missing)} of {len(needed)} wanted pictures did not come out by plan"
        return outcome

    def _from_start(self, wanted: Collection[int], receive: Receive) -> Outcome:
        self._media.use_one_thread()
        everything = [(0, len(self._packets.pts) - 1)]
        needed = self.needed(wanted)
        outcome = self._run(everything, needed, wanted, receive, skip=False)
        if outcome.out_of_order and not self._counted:
            self._counted = True
            outcome = self._run(everything, needed, wanted, receive, skip=False)
        return outcome

    def needed(self, wanted: Collection[int]) -> set[int]:
        """The pictures to decode for those `wanted`: themselves, and what their lines are rebuilt from."""
        return set(wanted) if self.deinterlace is None else with_neighbours(wanted, self.deinterlace)

    def _run(
        self,
        spans: Sequence[tuple[int, int]],
        needed: Collection[int],
        wanted: Collection[int],
        receive: Receive,
        *,
        skip: bool,
    ) -> Outcome:
        """Decode `spans`, and in them at least the pictures `needed`; those `wanted` are received."""
        outcome = Outcome()
        pictures = self._pictures(spans, needed, outcome, skip=skip)
        if self.deinterlace is None:
            for tick, picture in pictures:
                if tick in wanted:
                    receive(tick, picture)
        else:
            deinterlacer = Deinterlacer(self.deinterlace)
            ready = (deinterlacer.push(tick, picture) for tick, picture in pictures)
            for tick, picture in chain(chain.from_iterable(ready), _late(deinterlacer.flush)):
                if tick in wanted:
                    receive(tick, picture)
            outcome.deinterlaced = deinterlacer.interlaced
        self._media.reusable &= not outcome.doubt
        return outcome

    def _pictures(
        self, spans: Sequence[tuple[int, int]], needed: Collection[int], outcome: Outcome, *, skip: bool
    ) -> Iterator[tuple[int, VideoFrame]]:
        """(tick, picture) of all that comes out of `spans`, damaged ones too; notes in `outcome` how it went.

        With `skip`, pictures nobody refers to may be left out unless `needed`; without, it ends when
        all those needed are there intact.
        """
        waiting = set(needed)
        pts, timeline = self._packets.pts, self._packets.timeline.pts
        feed = self._packets.read(spans)
        decoder, warm = self._media.video.decoder, self._media.take_warm()
        size = (self._media.info.width, self._media.info.height)
        skipping = False
        decoder.skip_frame = "DEFAULT"
        for first, last in spans:
            if warm is None or first > 0:
                decoder.flush_buffers()
                warm = None
            # A flushed decoder forgets; the key frame at the head of the span is its fresh start.
            tainted, count, before = False, 0, None
            drain: list[tuple[int, Packet[VideoStream] | None]] = [(last, None)]
            for i, packet in chain(islice(feed, last - first + 1), drain):
                try:
                    if warm is not None and i < warm.fed and packet is not None:
                        pictures = warm.pictures if i == min(warm.fed - 1, last) else []
                    else:
                        if skipping != (skip and pts[i] not in needed):
                            skipping = not skipping
                            decoder.skip_frame = "NONREF" if skipping else "DEFAULT"
                        pictures = decoder.decode(packet)
                except MemoryError as error:
                    raise ClipError("limit_memory", f"no memory for a picture: {error}") from error
                except av.FFmpegError as error:
                    tainted = True
                    outcome.doubt = outcome.doubt or f"an undecodable packet: {error.strerror}"
                    pictures = []
                outcome.num_fed += packet is not None
                if pictures and (sar := decoder.sample_aspect_ratio):
                    outcome.sars.add(sar)
                for picture in pictures:
                    if (picture.width, picture.height) != size:
                        check_pixels(picture.width, picture.height, self._limits)
                        self._media.reusable = False
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
                    if tainted:
                        outcome.damaged.add(tick)
                        outcome.doubt = outcome.doubt or "the decoder flags damaged pictures"
                    else:
                        outcome.intact.add(tick)
                        waiting.discard(tick)
                    yield tick, picture
                if tainted and (tick := pts[i]) is not None:
                    outcome.failed.add(tick)
                if not skip and not waiting:
                    return
            warm = None


def needed_spans(packets: Packets, wanted: Collection[int]) -> list[tuple[int, int]]:
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
        while found and start <= found[-1][1] + 1:
            start = min(start, found.pop()[0])
        found.append((start, i))
    return found


def _into(homes: Mapping[int, np.ndarray], normalizer: Normalizer) -> Receive:
    return lambda tick, picture: normalizer.convert(picture, homes[tick])


def _late(call: Callable[[], Iterable[tuple[int, VideoFrame]]]) -> Iterator[tuple[int, VideoFrame]]:
    """What `call` gives, called only when it is its turn."""
    yield from call()


def _tainted(picture: VideoFrame, before: bool) -> bool:
    """Whether a picture is damaged, given whether the one before it was."""
    return picture.is_corrupt or (before and not picture.key_frame)
