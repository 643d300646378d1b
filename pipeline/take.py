"""One choice of pictures on its way to frames: where each is decoded to, and what is made of them.

In: a choice, its bucket, and the pictures known to be intact where that is known. Out: `homes`, the array of
each picture to decode, and once they are filled the frames, uint8 [F, H, W, 3]: a picture is decoded
straight into the first frame that shows it, repeats are copies, and blends are made from arrays aside.
A damaged picture is replaced by its nearest intact neighbour in time.

F frames, H, W pixels of the bucket.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection
from fractions import Fraction

import numpy as np

from pipeline.choice import ONE, Choice, repeats
from pipeline.short import hard_cuts, unblended_at
from pipeline.timeline import Timeline
from schemas.config import BucketConfig, LimitsConfig
from schemas.errors import ClipError

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class Take:
    """One choice of pictures, the arrays they are decoded into, and the frames made of them."""

    def __init__(
        self,
        timeline: Timeline,
        choice: Choice,
        *,
        intact: Collection[int] | None,
        bucket: BucketConfig,
        limits: LimitsConfig,
        buffer: np.ndarray | None,
    ) -> None:
        """`buffer`: flat uint8 for the frames, else a new one. ClipError `damaged` where more than
        `limits.max_damage` of the pictures are not `intact`."""
        self.timeline, self.choice = timeline, choice
        self._sources = _sources(choice, timeline, intact, limits)
        shape = (len(choice.pictures), bucket.height, bucket.width, 3)
        if buffer is None:
            buffer = np.empty(math.prod(shape), np.uint8)
        self._frames = buffer[: math.prod(shape)].reshape(shape)
        self.homes: dict[int, np.ndarray] = {}
        """Tick of each picture to decode -> where: the first frame that shows it as it is, else aside."""
        self._owners: dict[int, int] = {}
        for i, (picture, blend) in enumerate(zip(choice.pictures, choice.blends, strict=True)):
            if not blend:
                self._owners.setdefault(self._sources[picture], i)
        for tick in self._sources.values():
            aside = tick not in self._owners
            self.homes[tick] = np.empty(shape[1:], np.uint8) if aside else self._frames[self._owners[tick]]

    @property
    def effective_fps(self) -> float:
        """Frames per second of source time; the source's own rate where time stands still."""
        step = self.choice.step * self.timeline.time_base
        return float(1 / step) if step else self.timeline.fps

    @property
    def repaired(self) -> list[int]:
        """Frames made from a stand-in for a damaged picture."""
        lost = {picture for picture, tick in self._sources.items() if tick != self.timeline.pts[picture]}
        shown = zip(self.choice.pictures, self.choice.blends, strict=True)
        return [i for i, (p, blend) in enumerate(shown) if p in lost or (blend and p + 1 in lost)]

    @property
    def ticks(self) -> list[Fraction]:
        """Per frame the time of what it shows: a stand-in's own time, and for a blend one between two."""
        choice = self.choice
        ticks = list(choice.ticks)
        for i in self.repaired:
            picture, blend = choice.pictures[i], choice.blends[i]
            here = self._sources[picture]
            there = self._sources[picture + 1] if blend else here
            ticks[i] = here + Fraction(blend, ONE) * (there - here)
        return ticks

    @property
    def duplicated(self) -> list[int]:
        """Frames that show the same picture as the frame before them."""
        return repeats(self.ticks, self.choice.blends)

    def finish(self) -> np.ndarray:
        """All frames, once `homes` are filled: copies for repeats, blends except across hard cuts."""
        if self.choice.interpolated:
            self.choice = unblended_at(self.choice, self._cuts(), timeline=self.timeline)
        for i, (picture, blend) in enumerate(zip(self.choice.pictures, self.choice.blends, strict=True)):
            tick = self._sources[picture]
            if blend:
                here = self.homes[tick].astype(np.uint16) * (ONE - blend)
                there = self.homes[self._sources[picture + 1]].astype(np.uint16) * blend
                self._frames[i] = (here + there + ONE // 2) // ONE
            elif self._owners.get(tick) != i:
                self._frames[i] = self.homes[tick]
        return self._frames

    def _cuts(self) -> set[int]:
        """Pictures followed by a hard cut, judged on every fourth pixel."""
        needed = self.choice.needed
        luma = {p: self.homes[self._sources[p]][::4, ::4] @ _LUMA for p in needed}
        return hard_cuts({p: float(np.abs(luma[p] - luma[p + 1]).mean()) for p in needed if p + 1 in luma})


def _sources(
    choice: Choice, timeline: Timeline, intact: Collection[int] | None, limits: LimitsConfig
) -> dict[int, int]:
    """Picture -> tick to take it from: its own, or once `intact` is known, its nearest intact neighbour's."""
    sources = {picture: timeline.pts[picture] for picture in choice.needed}
    if intact is None:
        return sources
    lost = [picture for picture, tick in sources.items() if tick not in intact]
    if not intact or len(lost) > limits.max_damage * len(sources):
        raise ClipError(
            "damaged",
            f"{len(lost)} of {len(sources)} wanted pictures are damaged, over limits.max_damage = "
            f"{limits.max_damage}",
        )
    ordered = sorted(intact)
    for picture in lost:
        tick = sources[picture]
        k = bisect.bisect_left(ordered, tick)
        _, sources[picture] = min((abs(near - tick), near) for near in ordered[max(0, k - 1) : k + 1])
    return sources
