"""Which pictures of a clip become its frames: pure functions on timestamps.

In: a `Timeline` and the `[frames]` settings. Out: a `Choice`: per frame the picture on screen, and how
much of the next picture is blended in. Timestamps decide, never a container's frame count or nominal
rate, in exact integers and fractions. The trade-off: where timestamps are a constant rate rounded to
ticks, index arithmetic stands in for times, so that half a tick neither repeats nor skips a picture.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from pipeline.clip import ClipInfo
from pipeline.timeline import Timeline
from schemas.config import FramesConfig
from schemas.errors import ClipError, RunError

ONE = 256
"""Blend weights are whole 256ths."""
MAX_GAP = 4
"""No blending over a gap of more than this many median intervals: something is missing there."""
CUT_LEVELS = 20.0
CUT_RATIO = 4.0
"""A hard cut: mean luma difference above CUT_LEVELS (of 255) and CUT_RATIO times the clip's median."""
_STILL = 0.5
"""Weight, before normalising, of a frame in which nothing changes."""


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
    """Ticks of source time between frames."""
    coverage: float
    """Share of the timeline's duration that the frames stand for."""

    @property
    def needed(self) -> list[int]:
        """Positions in the timeline of every picture used, each once, in order."""
        blended = {p + 1 for p, blend in zip(self.pictures, self.blends, strict=True) if blend}
        return sorted(blended.union(self.pictures))

    @property
    def interpolated(self) -> list[int]:
        return [i for i, blend in enumerate(self.blends) if blend]

    @property
    def duplicated(self) -> list[int]:
        """Frames that show the same picture as the frame before them."""
        shown = list(zip(self.pictures, self.blends, strict=True))
        return [i for i in range(1, len(shown)) if shown[i] == shown[i - 1] and not shown[i][1]]


def choose_frames(timeline: Timeline, *, num_frames: int, frames: FramesConfig) -> Choice:
    """`num_frames` frames of `timeline` under the settings in `frames`.

    `uniform`: frame i is the picture on screen at i / num_frames of the clip; at a constant rate that is
    picture floor(i * S) with S = pictures / num_frames. `fps`: the picture on screen at i / target_fps,
    cut after num_frames. Too few pictures: ClipError `too_short` or RunError where `frames.short` asks
    for them.
    """
    pts = timeline.pts
    if frames.policy == "uniform":
        step = Fraction(timeline.end - pts[0], num_frames)
        pictures = _uniform(timeline, num_frames) if len(pts) >= num_frames else list(range(len(pts)))
    else:
        # 29.97, 25 / 3 and 24000 / 1001 mean the fraction they round, not a binary neighbour of it.
        exact = Fraction(frames.target_fps)
        step = 1 / ((exact.limit_denominator(1001) or exact) * timeline.time_base)
        count = min(num_frames, -((pts[0] - timeline.end) // step))
        pictures = _on_screen(timeline, step, count)
    if len(pictures) < num_frames:
        if frames.short == "interpolate":
            return _spread(timeline, num_frames)
        if frames.short == "repeat_last":
            if frames.policy == "uniform":
                step = Fraction(timeline.end - pts[0], len(pts))
            pictures += pictures[-1:] * (num_frames - len(pictures))
        else:
            message = _too_short(timeline, num_frames, len(pictures), frames)
            raise ClipError("too_short", message) if frames.short == "drop" else RunError(message)
    return _unblended(timeline, pictures, step)


def num_available(duration_s: float, num_pictures: int, *, frames: FramesConfig) -> int:
    """Frames a clip can fill without repeating or blending: what the choice of a bucket looks at."""
    return num_pictures if frames.policy == "uniform" else max(1, int(duration_s * frames.target_fps))


def check_window(info: ClipInfo, *, start_s: float | None, end_s: float | None) -> None:
    """ClipError `empty_window` where a row's time window lies outside its clip."""
    start, end = start_s or 0.0, info.duration_s if end_s is None else end_s
    if start >= end or start >= info.duration_s:
        raise ClipError(
            "empty_window",
            f"the window {start} s to {end} s holds no picture; the clip lasts {info.duration_s:.3f} s",
        )


def hard_cuts(differences: Mapping[int, float]) -> set[int]:
    """Pictures followed by a hard cut, given the mean luma difference of each to the next one."""
    usual = statistics.median(differences.values()) if differences else 0.0
    return {p for p, value in differences.items() if value > max(CUT_LEVELS, CUT_RATIO * usual)}


def unblended_at(choice: Choice, cuts: Collection[int], *, timeline: Timeline) -> Choice:
    """`choice` with the nearer picture wherever a blend would run from a picture in `cuts` to the next."""
    pictures, blends, ticks = list(choice.pictures), list(choice.blends), list(choice.ticks)
    for i, (picture, blend) in enumerate(zip(choice.pictures, choice.blends, strict=True)):
        if blend and picture in cuts:
            pictures[i], blends[i] = picture + (2 * blend >= ONE), 0
            ticks[i] = Fraction(timeline.pts[pictures[i]])
    return replace(choice, pictures=tuple(pictures), blends=tuple(blends), ticks=tuple(ticks))


def frame_weights(choice: Choice, timeline: Timeline) -> list[float]:
    """Activity per frame, mean 1: packet sizes, each relative to the median of its kind (key or not).

    A frame stands for the pictures since the frame before it, a blended one for the two it lies between.
    A weak proxy: sizes follow bit-rate control as well as motion, hence the floor under every weight.
    """
    usual = {
        kind: statistics.median(
            size for size, key in zip(timeline.sizes, timeline.keys, strict=True) if key == kind
        )
        for kind in set(timeline.keys)
    }
    activity = [
        min(2.0, size / usual[key]) if usual[key] else 1.0
        for size, key in zip(timeline.sizes, timeline.keys, strict=True)
    ]
    weights, before = [], -1
    for picture, blend in zip(choice.pictures, choice.blends, strict=True):
        since = activity[before + 1 : picture + 1] or (activity[picture + 1 : picture + 2] if blend else [])
        weights.append(_STILL + (1 - _STILL) * (statistics.fmean(since) if since else 0.0))
        before = picture
    mean = statistics.fmean(weights)
    return [round(weight / mean, 4) for weight in weights]


def _uniform(timeline: Timeline, num_frames: int) -> list[int]:
    """As many frames as asked from at least as many pictures."""
    count = len(timeline.pts)
    if count == num_frames or timeline.grid is not None:
        return [i * count // num_frames for i in range(num_frames)]
    return _on_screen(timeline, Fraction(timeline.end - timeline.pts[0], num_frames), num_frames)


def _on_screen(timeline: Timeline, step: Fraction, count: int) -> list[int]:
    """The picture on screen at each of `count` times, `step` ticks apart."""
    pts = timeline.pts
    if timeline.grid is not None:
        interval, slack = timeline.grid
        return [min(int((i * step + slack) / interval), len(pts) - 1) for i in range(count)]
    return [bisect.bisect_right(pts, pts[0] + int(i * step)) - 1 for i in range(count)]


def _spread(timeline: Timeline, num_frames: int) -> Choice:
    """`num_frames` frames evenly from the first to the last picture, blended where they fall between two.

    A clip with enough pictures (one that is only too short at its target rate) needs no blending.
    """
    pts = timeline.pts
    if len(pts) >= num_frames:
        step = Fraction(timeline.end - pts[0], num_frames)
        return _unblended(timeline, _uniform(timeline, num_frames), step)
    usual = statistics.median(b - a for a, b in pairwise(pts)) if len(pts) > 1 else 0
    step = Fraction(pts[-1] - pts[0], max(1, num_frames - 1))
    pictures, blends, ticks = [], [], []
    for i in range(num_frames):
        tick = pts[0] + i * step
        picture = bisect.bisect_right(pts, tick) - 1
        blend = 0
        if picture + 1 < len(pts):
            gap = pts[picture + 1] - pts[picture]
            blend = round(ONE * (tick - pts[picture]) / gap)
            if blend == ONE or (gap > MAX_GAP * usual and 2 * blend >= ONE):
                picture, blend = picture + 1, 0
            elif gap > MAX_GAP * usual:
                blend = 0
        pictures.append(picture)
        blends.append(blend)
        ticks.append(tick if blend else Fraction(pts[picture]))
    return Choice(tuple(pictures), tuple(blends), tuple(ticks), step, coverage=1.0)


def _unblended(timeline: Timeline, pictures: Sequence[int], step: Fraction) -> Choice:
    ticks = tuple(Fraction(timeline.pts[picture]) for picture in pictures)
    coverage = min(Fraction(1), step * len(pictures) / (timeline.end - timeline.pts[0]))
    return Choice(tuple(pictures), (0,) * len(pictures), ticks, step, float(coverage))


def _too_short(timeline: Timeline, num_frames: int, found: int, frames: FramesConfig) -> str:
    rate = "" if frames.policy == "uniform" else f" at {frames.target_fps} fps"
    return (
        f"{found} pictures{rate} in {timeline.duration_s:.2f} s where {num_frames} frames are wanted; "
        f"frames.short = {frames.short!r} refuses to fill up (interpolate or repeat_last would)"
    )
