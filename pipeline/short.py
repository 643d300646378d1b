"""Too few pictures for the frames that are wanted: fill up by rule, or refuse.

In: a timeline, the pictures a policy found, and `frames.short`. Out: a `Choice` of exactly num_frames, or
ClipError `too_short`. Blending is linear in time and stays inside a shot: never over a gap, and once the
pictures are decoded, never over a hard cut. Better motion would need a model; what is made up is marked
instead.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from pipeline.choice import ONE, Choice, as_they_are, evenly
from pipeline.timeline import MAX_GAP, Timeline
from schemas.config import AT_A_RATE, FramesConfig
from schemas.errors import ClipError, RunError

CUT_LEVELS = 20.0
CUT_RATIO = 4.0
SURE_CUT_LEVELS = 60.0
"""A hard cut: mean luma difference above CUT_LEVELS (of 255) and CUT_RATIO times the median of the clip's
other differences; above SURE_CUT_LEVELS in any case."""
SLOW = 2
"""Above this many frames for each picture a note is taken: blends begin to look like slow motion."""


def fill_up(
    timeline: Timeline, pictures: Sequence[int], *, num_frames: int, frames: FramesConfig, step: Fraction
) -> Choice:
    """`num_frames` frames where a policy found only `pictures`, `step` ticks apart.

    ClipError `too_short` where `frames.short` or `frames.max_slowdown` refuses, RunError for `error`.
    """
    if frames.short in ("drop", "error"):
        message = (
            f"{_found(len(pictures), frames)} in {timeline.duration_s:.2f} s where {num_frames} frames are "
            f"wanted; frames.short = {frames.short!r} refuses to fill up (interpolate, nearest or "
            f"repeat_last would)"
        )
        raise ClipError("too_short", message) if frames.short == "drop" else RunError(message)
    notes = slowdown(len(pictures), num_frames=num_frames, frames=frames)
    if frames.short == "repeat_last":
        repeated = [*pictures, *[pictures[-1]] * (num_frames - len(pictures))]
        return as_they_are(timeline, repeated, step=step, notes=notes)
    return replace(_spread(timeline, num_frames, blended=frames.short == "interpolate"), notes=notes)


def slowdown(found: int, *, num_frames: int, frames: FramesConfig) -> tuple[str, ...]:
    """The note on `num_frames` frames made of `found` pictures; ClipError over `frames.max_slowdown`."""
    text = (
        f"{_found(found, frames)} stretched over {num_frames} frames, {num_frames / found:.1f} times slower"
    )
    if frames.max_slowdown is not None and num_frames > Fraction(frames.max_slowdown) * found:
        raise ClipError("too_short", f"{text}, over frames.max_slowdown = {frames.max_slowdown:g}")
    return (text,) if num_frames > SLOW * found else ()


def hard_cuts(differences: Mapping[int, float]) -> set[int]:
    """Pictures followed by a hard cut, given the mean luma difference of each to the next one."""
    usual = _median_of_others(list(differences.values()), alone=0.0)
    return {
        p
        for (p, value), other in zip(differences.items(), usual, strict=True)
        if value > max(CUT_LEVELS, min(SURE_CUT_LEVELS, CUT_RATIO * other))
    }


def unblended_at(choice: Choice, cuts: Collection[int], *, timeline: Timeline) -> Choice:
    """`choice` with the nearer picture wherever a blend would run from a picture in `cuts` to the next."""
    pictures, blends, ticks = list(choice.pictures), list(choice.blends), list(choice.ticks)
    for i, (picture, blend) in enumerate(zip(choice.pictures, choice.blends, strict=True)):
        if blend and picture in cuts:
            pictures[i], blends[i] = picture + (2 * blend >= ONE), 0
            ticks[i] = Fraction(timeline.pts[pictures[i]])
    return replace(choice, pictures=tuple(pictures), blends=tuple(blends), ticks=tuple(ticks))


def _spread(timeline: Timeline, num_frames: int, *, blended: bool) -> Choice:
    """`num_frames` frames evenly from the first to the last picture: blends where they fall between two,
    or the nearer one (the later where both are as near).

    A clip with enough pictures (one that is only too short at its target rate) needs neither.
    """
    pts = timeline.pts
    if len(pts) >= num_frames:
        step = Fraction(timeline.end - pts[0], num_frames)
        return as_they_are(timeline, evenly(timeline, num_frames), step=step)
    gaps = [b - a for a, b in pairwise(pts)]
    usual = _median_of_others(gaps, alone=timeline.end - pts[-1])
    step = Fraction(pts[-1] - pts[0], max(1, num_frames - 1))
    pictures, blends, ticks = [], [], []
    for i in range(num_frames):
        tick = pts[0] + i * step
        picture = bisect.bisect_right(pts, tick) - 1
        blend = 0
        if picture + 1 < len(pts):
            gap = pts[picture + 1] - pts[picture]
            blend = round(ONE * (tick - pts[picture]) / gap)
            nearest = not blended or gap > MAX_GAP * usual[picture]
            if blend == ONE or (nearest and 2 * (tick - pts[picture]) >= gap):
                picture, blend = picture + 1, 0
            elif nearest:
                blend = 0
        pictures.append(picture)
        blends.append(blend)
        ticks.append(tick if blend else Fraction(pts[picture]))
    return Choice(tuple(pictures), tuple(blends), tuple(ticks), step, coverage=1.0)


def _median_of_others(values: Sequence[float], *, alone: float) -> list[float]:
    """Per value the lower median of all the others, `alone` where there are none: in a short clip one cut
    or gap must not be what it is measured by."""
    ordered = sorted(values)
    if len(ordered) < 2:
        return [alone] * len(ordered)
    middle = (len(ordered) - 2) // 2
    return [ordered[middle + (value <= ordered[middle])] for value in values]


def _found(count: int, frames: FramesConfig) -> str:
    rate = f" at {frames.target_fps:g} fps" if frames.policy in AT_A_RATE else ""
    return f"{count} {'picture' if count == 1 else 'pictures'}{rate}"
