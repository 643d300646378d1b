"""How much happens at each picture of a clip: from packet sizes for free, or from its true luma.

In: a `Timeline`, and for the exact kind the measured luma changes. Out: one whole number >= 0 per picture,
comparable within the clip only. Half of a clip is its usual course (noise, a steady pan) and counts as
nothing, so that what stands out does so. The trade-off: sizes follow the encoder's bit-rate control as
well as motion. They show where still and busy stretches lie in most H.264 and HEVC files, and little in
constant bit-rate ones or about single cuts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import pairwise

from pipeline.timeline import Timeline

_UNIT = 1024
"""Activity of a picture whose packet has the median size of its kind."""
_MOST = 64
"""A packet counts as at most this many times, and at least one part in as many, of the median of its kind:
ratios are clipped evenly in the logarithm."""
_CUT_BONUS = 8 * _UNIT
_REACH = 2
"""Pictures on either side: over so many sizes are averaged, as what a B-picture leaves out is in the
next forward one, and so many share in the bonus of a scene cut, so that frames show both shots."""
_SPARSE = 8
"""Keys tell of scene cuts only when at most one picture in this many is one."""


@functools.lru_cache(maxsize=1)
def packet_activity(timeline: Timeline) -> tuple[int, ...]:
    """Activity of each picture from the sizes of packets, nothing decoded.

    Each size is relative to the median of its kind (key, forward or backward: the kinds differ in size at
    the same activity), clipped, and averaged with its neighbours'. Pictures next to a key that an encoder
    put out of turn, as it does at scene cuts, get a bonus.
    """
    kinds = list(zip(timeline.keys, timeline.backward, strict=True))
    usual = {
        kind: max(1, _median([size for size, own in zip(timeline.sizes, kinds, strict=True) if own == kind]))
        for kind in set(kinds)
    }
    relative = [
        min(_MOST * _UNIT, max(_UNIT // _MOST, size * _UNIT // usual[kind]))
        for size, kind in zip(timeline.sizes, kinds, strict=True)
    ]
    around = [range(max(0, p - _REACH), min(len(relative), p + _REACH + 1)) for p in range(len(relative))]
    activity = _above_usual([sum(relative[near] for near in nearby) // len(nearby) for nearby in around])
    for cut in _cut_keys(timeline):
        for picture in around[cut]:
            activity[picture] += _CUT_BONUS
    return tuple(activity)


def luma_activity(timeline: Timeline, changes: Mapping[int, float]) -> list[int]:
    """Activity of each picture from `changes`: tick -> mean luma difference to the picture before, 0..255.

    A picture without one (the first, an undecodable one) takes that of the next picture that has one.
    """
    activity, known = [], 0
    for tick in reversed(timeline.pts):
        # Quantised: the choice of frames must not hang on the last bits of a mean.
        known = round(changes[tick] * _UNIT) if tick in changes else known
        activity.append(known)
    return _above_usual(activity[::-1])


def _above_usual(activity: Sequence[int]) -> list[int]:
    usual = _median(activity)
    return [max(0, value - usual) for value in activity]


def _median(values: Sequence[int]) -> int:
    """The upper one of two."""
    return sorted(values)[len(values) // 2]


def _cut_keys(timeline: Timeline) -> list[int]:
    """Key pictures that come clearly sooner after the last than the file's longest distance between keys.

    Encoders start a group at a scene cut, or when the longest allowed one is full. Files whose groups are
    all of one length or very short tell nothing.
    """
    keys = [picture for picture, key in enumerate(timeline.keys) if key]
    if len(keys) * _SPARSE > len(timeline.keys):
        return []
    longest = max((b - a for a, b in pairwise(keys)), default=0)
    return [b for a, b in pairwise(keys) if 10 * (b - a) < 9 * longest]
