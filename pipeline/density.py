"""Frames at the quantiles of activity over time: policy `keyframe`.

In: a timeline with at least as many pictures as frames, and one activity per picture. Out: strictly
increasing picture positions. The whole clip holds a mass of num_frames; a picture's share of it is

    (1 - b) * its share of time + b * its share of activity,    b = boost / (1 + boost)

and frame i is the picture that holds mass i. A picture is shown at most once: mass above one frame is
spread over the others in proportion. So frames are never further apart than (1 + boost) * S plus the time
the earlier picture is on screen, S = duration / num_frames: what lies between two neighbouring frames
weighs less than one, and S of time weighs at least 1 - b = 1 / (1 + boost). Whole numbers throughout: the
same activity gives the same frames everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from pipeline.timeline import Timeline


def quantiles(timeline: Timeline, num_frames: int, *, boost: float, activity: Sequence[int]) -> list[int]:
    """Positions of `num_frames` pictures, denser where `activity` (one value >= 0 per picture) is high.

    At boost 0, or without any activity, these are the even ones at a constant rate.
    """
    b = Fraction(boost)
    spans = [1] * len(timeline.pts)
    if timeline.grid is None:
        spans = [after - tick for tick, after in pairwise((*timeline.pts, timeline.end))]
    of_time, of_activity = sum(activity) * b.denominator, sum(spans) * b.numerator
    if not of_time:
        of_time, of_activity = 1, 0
    masses = [of_time * span + of_activity * value for span, value in zip(spans, activity, strict=True)]
    full, rest, left = _whole_frames(masses, num_frames)
    chosen: list[int] = []
    mass = 0
    for picture, own in enumerate(masses):
        # In units of 1 / rest frames, so that the sum over the clip is num_frames * rest exactly.
        mass += rest if picture in full else own * left
        if len(chosen) * rest < mass:
            chosen.append(picture)
    return chosen


def _whole_frames(masses: Sequence[int], num_frames: int) -> tuple[set[int], int, int]:
    """The pictures whose mass is cut to one frame; the mass of the others, and the frames left to them."""
    full: set[int] = set()
    rest, left = sum(masses), num_frames
    for picture in sorted(range(len(masses)), key=lambda p: (-masses[p], p)):
        if masses[picture] * left <= rest:
            break
        full.add(picture)
        rest -= masses[picture]
        left -= 1
    return full, rest, left
