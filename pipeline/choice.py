"""What the frames of a sample are, and the two plain ways to pick them.

In: a `Timeline`. Out: a `Choice`: per frame the picture on screen, and how much of the next picture is
blended in. The trade-off: where timestamps are a constant rate rounded to ticks, index arithmetic stands
in for times, so that half a tick neither repeats nor skips a picture.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from pipeline.timeline import Timeline

ONE = 256
"""Blend weights are whole 256ths."""


@dataclass(frozen=True)
class Choice:
    """The frames of one sample, in order."""

    pictures: tuple[int, ...]
    """Per frame: position in the timeline of the picture on screen; never decreases."""
    blends: tuple[int, ...]
    """Per frame: 256ths of the following picture blended in; 0 takes the picture as it is."""
    ticks: tuple[Fraction, ...]
    """Per frame: its time; a picture's own timestamp where nothing is blended."""
    step: Fraction
    """Ticks of source time between frames; the mean where they are not evenly spread."""
    coverage: float
    """Share of the timeline's duration that the frames stand for, in (0, 1]."""
    notes: tuple[str, ...] = ()
    """What a person should know of this choice, one sentence each."""

    @property
    def needed(self) -> list[int]:
        """Positions in the timeline of every picture used, each once, in order."""
        blended = {p + 1 for p, blend in zip(self.pictures, self.blends, strict=True) if blend}
        return sorted(blended.union(self.pictures))

    @property
    def interpolated(self) -> list[int]:
        return [i for i, blend in enumerate(self.blends) if blend]


def repeats(shown: Sequence[object], blends: Sequence[int]) -> list[int]:
    """Frames that show, without blending, what the frame before them shows."""
    frames = list(zip(shown, blends, strict=True))
    return [i for i in range(1, len(frames)) if frames[i] == frames[i - 1] and not blends[i]]


def as_they_are(
    timeline: Timeline, pictures: Sequence[int], *, step: Fraction, notes: tuple[str, ...] = ()
) -> Choice:
    """The choice that shows `pictures` without blending, `step` ticks apart on average."""
    ticks = tuple(Fraction(timeline.pts[picture]) for picture in pictures)
    coverage = min(Fraction(1), step * len(pictures) / (timeline.end - timeline.pts[0]))
    return Choice(tuple(pictures), (0,) * len(pictures), ticks, step, float(coverage), notes)


def evenly(timeline: Timeline, num_frames: int) -> list[int]:
    """The pictures on screen at i / num_frames of the timeline, from at least as many pictures."""
    count = len(timeline.pts)
    if count == num_frames or timeline.grid is not None:
        return [i * count // num_frames for i in range(num_frames)]
    step = Fraction(timeline.end - timeline.pts[0], num_frames)
    return on_screen(timeline, step, range(num_frames))


def on_screen(timeline: Timeline, step: Fraction, numbers: Iterable[int]) -> list[int]:
    """The picture on screen at each of the times `numbers`, counted in steps of `step` ticks."""
    pts = timeline.pts
    if timeline.grid is not None:
        interval, slack = timeline.grid
        return [min(int((i * step + slack) / interval), len(pts) - 1) for i in numbers]
    return [bisect.bisect_right(pts, pts[0] + int(i * step)) - 1 for i in numbers]
