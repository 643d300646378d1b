"""Which pictures of a clip become its frames: pure functions on timestamps.

In: a `Timeline` cut to the window, and the `[frames]` settings. Out: a `Choice` of exactly num_frames.
Timestamps decide, never a container's frame count or nominal rate, in whole numbers and fractions: the same
file gives the same frames everywhere. The trade-off: of the policies only `keyframe` looks at what is
in the clip, and it never gives up the even spread for it altogether.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from pipeline.activity import packet_activity
from pipeline.choice import Choice, as_they_are, evenly, on_screen
from pipeline.compatibility import RULES, Asked
from pipeline.density import quantiles
from pipeline.short import fill_up, slowdown
from pipeline.timeline import Timeline
from schemas.config import AT_A_RATE, SEVERAL, FramesConfig
from schemas.errors import ClipError

_STILL = 0.5
"""Weight, before normalising, of a frame in which nothing changes."""
_BUSIEST = 2.0
"""A picture counts as at most this many times the clip's mean activity in a frame's weight."""
_WHOLE = 0.9
"""A compatibility rule that keeps less than this share of a clip is worth a note."""


def choose_frames(
    timeline: Timeline,
    *,
    num_frames: int,
    frames: FramesConfig,
    clip: int = 0,
    activity: Sequence[int] | None = None,
) -> Choice:
    """`num_frames` frames of `timeline` under the settings in `frames`.

    - `uniform`: frame i is the picture on screen at i / num_frames of the clip; at a constant rate that is
      picture floor(i * S) with S = pictures / num_frames.
    - `keyframe`: the same by activity instead of time alone (`pipeline/density.py`); `activity` has one
      value >= 0 per picture, None takes packet sizes.
    - `fps`: the picture on screen at i / target_fps. `contiguous`: every k-th picture, k the whole number
      nearest to source rate / target_fps. Both from frame clip * num_frames (`chunk`) or clip *
      slide_step (`slide`) of the sequence that starts with the first picture.
    - The others: `pipeline/compatibility.py`.

    Too few pictures: ClipError `too_short` or RunError where `frames.short` asks for them; ClipError also
    where a compatibility rule refuses the clip, and for a `clip` that the timeline does not hold.
    """
    clips = num_clips(timeline, num_frames=num_frames, frames=frames)
    if clip >= clips:
        raise ClipError("too_short", f"clip {clip} (counted from 0) was asked for, but the row makes {clips}")
    count, total = len(timeline.pts), timeline.end - timeline.pts[0]
    if frames.policy in RULES:
        return _by_rule(timeline, num_frames, frames)
    if frames.policy in AT_A_RATE:
        step, available = _rate(timeline, frames)
        first = clip * (frames.slide_step if frames.clips == "slide" else num_frames)
        numbers = range(first, min(first + num_frames, available))
        if frames.policy == "fps":
            pictures = on_screen(timeline, step, numbers)
        else:
            pictures = [i * _stride(timeline, frames) for i in numbers]
    elif count < num_frames:
        step, pictures = Fraction(total, count), list(range(count))
    else:
        step = Fraction(total, num_frames)
        if frames.policy == "uniform" or not frames.boost:
            pictures = evenly(timeline, num_frames)
        else:
            activity = packet_activity(timeline) if activity is None else activity
            pictures = quantiles(timeline, num_frames, boost=frames.boost, activity=activity)
    if len(pictures) < num_frames:
        return fill_up(timeline, pictures, num_frames=num_frames, frames=frames, step=step)
    return as_they_are(timeline, pictures, step=step)


def num_available(timeline: Timeline, *, frames: FramesConfig) -> int:
    """Frames the timeline gives without filling up: what the choice of a bucket looks at."""
    return _rate(timeline, frames)[1] if frames.policy in AT_A_RATE else len(timeline.pts)


def num_clips(timeline: Timeline, *, num_frames: int, frames: FramesConfig) -> int:
    """Clips a row makes: as many full ones as fit, at least 1; always 1 under `head` and `whole`."""
    if frames.clips not in SEVERAL:
        return 1
    step = num_frames if frames.clips == "chunk" else frames.slide_step
    return max(0, num_available(timeline, frames=frames) - num_frames) // step + 1


def frame_weights(choice: Choice, timeline: Timeline, activity: Sequence[int] | None = None) -> list[float]:
    """Activity per frame, mean 1; from packet sizes where `activity` (one value per picture) is None.

    A frame stands for the pictures since the frame before it, a blended one for the two it lies between.
    A weak proxy for motion, hence the floor under every weight.
    """
    activity = packet_activity(timeline) if activity is None else activity
    usual = statistics.fmean(activity) or 1.0
    relative = [min(_BUSIEST, value / usual) for value in activity]
    weights, before = [], choice.pictures[0] - 1
    for picture, blend in zip(choice.pictures, choice.blends, strict=True):
        since = relative[before + 1 : picture + 1] or (relative[picture + 1 : picture + 2] if blend else [])
        weights.append(_STILL + (1 - _STILL) * (statistics.fmean(since) if since else 0.0))
        before = picture
    mean = statistics.fmean(weights)
    return [round(weight / mean, 4) for weight in weights]


def _rate(timeline: Timeline, frames: FramesConfig) -> tuple[Fraction, int]:
    """Ticks between frames under `fps` and `contiguous`, and how many frames the timeline gives."""
    if frames.policy == "contiguous":
        stride = _stride(timeline, frames)
        return stride * timeline.interval, -(-len(timeline.pts) // stride)
    step = 1 / (_simple(Fraction(frames.target_fps)) * timeline.time_base)
    # Where ticks are rounded, the last fraction of one is no room for another frame.
    slack = timeline.grid.slack if timeline.grid else 0
    return step, max(1, -((timeline.pts[0] + slack - timeline.end) // step))


def _stride(timeline: Timeline, frames: FramesConfig) -> int:
    """Pictures from one frame of `contiguous` to the next; a tie goes to the even number."""
    return max(1, round(_source_fps(timeline) / _simple(Fraction(frames.target_fps))))


def _source_fps(timeline: Timeline) -> Fraction:
    return _simple(1 / (timeline.interval * timeline.time_base))


def _simple(rate: Fraction) -> Fraction:
    """29.97, 25 / 3 and 24000 / 1001 mean the fraction they round, not a binary neighbour of it."""
    return rate.limit_denominator(1001) or rate


def _by_rule(timeline: Timeline, num_frames: int, frames: FramesConfig) -> Choice:
    """The pictures another trainer would take; ticks and rates are those of this file."""
    pts = timeline.pts
    asked = Asked(len(pts), float(_source_fps(timeline)), num_frames, frames.target_fps)
    pictures = RULES[frames.policy](asked)
    found = len(set(pictures))
    notes = slowdown(found, num_frames=num_frames, frames=frames)
    step = Fraction(pts[pictures[-1]] - pts[pictures[0]], found - 1) if found > 1 else timeline.interval
    kept = min(1.0, float(step * found / (timeline.end - pts[0])))
    if kept < _WHOLE:
        notes += (f"{frames.policy} keeps {kept:.0%} of the clip's {timeline.duration_s:.2f} s",)
    return replace(as_they_are(timeline, pictures, step=step), coverage=kept, notes=notes)
