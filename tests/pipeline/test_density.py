"""Policy `keyframe`: more frames where more happens, and never too few elsewhere."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from pipeline.frames import choose_frames
from pipeline.timeline import Timeline
from schemas.config import FramesConfig
from tests.pipeline.timelines import any_timeline, constant, timeline

BOOSTS = st.one_of(st.sampled_from([0.1, 0.5, 1.0, 2.0, 4.0, 1000.0]), st.floats(0, 20))


def keyframe(boost: float) -> FramesConfig:
    return FramesConfig(policy="keyframe", boost=boost)


def activities(clip: Timeline) -> st.SearchStrategy[list[int]]:
    count = len(clip.pts)
    values = st.one_of(st.integers(0, 10), st.integers(0, 10**6))
    bursts = st.tuples(st.integers(0, count), st.integers(0, count)).map(
        lambda ends: [10**5 * (min(ends) <= p < max(ends)) for p in range(count)]
    )
    return st.one_of(st.lists(values, min_size=count, max_size=count), bursts)


@given(any_timeline(), st.integers(1, 80), BOOSTS, st.data())
def test_frames_are_never_further_apart_than_promised(
    clip: Timeline, num_frames: int, boost: float, data: st.DataObject
) -> None:
    assume(len(clip.pts) >= num_frames)
    activity = data.draw(activities(clip))
    choice = choose_frames(clip, num_frames=num_frames, frames=keyframe(boost), activity=activity)
    if boost:
        assert all(a < b for a, b in pairwise(choice.pictures))
    assert choice.pictures[0] == 0
    assert choice.coverage == 1.0
    assert choice.step == Fraction(clip.end - clip.pts[0], num_frames)
    # A rate rounded to ticks counts as the constant rate it is: any two times may be two ticks off.
    off = 2 if clip.grid is not None and clip.grid.slack else 0
    slack = off + (1 + Fraction(boost)) * Fraction(off, num_frames)
    edges = (*choice.pictures, len(clip.pts))
    for a, b in pairwise(edges):
        until = clip.pts[b] if b < len(clip.pts) else clip.end
        shown = (clip.pts[a + 1] if a + 1 < len(clip.pts) else clip.end) - clip.pts[a]
        assert until - clip.pts[a] <= (1 + Fraction(boost)) * choice.step + shown + slack
    even = choose_frames(clip, num_frames=num_frames, frames=keyframe(0))
    event(f"boosted: {choice.pictures != even.pictures}")


@given(any_timeline(), st.integers(1, 80), st.data())
def test_boost_zero_is_uniform(clip: Timeline, num_frames: int, data: st.DataObject) -> None:
    activity = data.draw(activities(clip))
    uniform = choose_frames(clip, num_frames=num_frames, frames=FramesConfig(policy="uniform"))
    assert choose_frames(clip, num_frames=num_frames, frames=keyframe(0), activity=activity) == uniform


@given(constant(), st.integers(1, 80), BOOSTS, st.integers(0, 9))
def test_the_same_activity_everywhere_is_uniform(
    clip: Timeline, num_frames: int, boost: float, activity: int
) -> None:
    uniform = choose_frames(clip, num_frames=num_frames, frames=FramesConfig(policy="uniform"))
    found = choose_frames(
        clip, num_frames=num_frames, frames=keyframe(boost), activity=[activity] * len(clip.pts)
    )
    assert found == uniform


@pytest.mark.parametrize(("boost", "inside"), [(0.0, 4), (1.0, 22), (3.0, 31), (1000.0, 40)])
def test_a_burst_gets_its_share(boost: float, inside: int) -> None:
    clip = timeline([i * 40 for i in range(400)], last=40)
    activity = [int(200 <= p < 240) for p in range(400)]
    choice = choose_frames(clip, num_frames=40, frames=keyframe(boost), activity=activity)
    # Its share of time, 0.1, for 1 / (1 + boost) of the frames, and all of the others.
    assert abs(sum(200 <= p < 240 for p in choice.pictures) - inside) <= 1


def test_what_one_picture_cannot_take_goes_to_the_others() -> None:
    clip = timeline([i * 40 for i in range(100)], last=40)
    cut = [0] * 50 + [1] + [0] * 49
    choice = choose_frames(clip, num_frames=20, frames=keyframe(1.0), activity=cut)
    assert 50 in choice.pictures
    assert max(b - a for a, b in pairwise(choice.pictures)) <= 6  # even, not the 10 that boost 1 allows


def test_packet_sizes_are_the_default() -> None:
    sizes = [2000 if 200 <= p < 240 else 100 for p in range(400)]
    clip = timeline([i * 40 for i in range(400)], last=40, sizes=sizes)
    choice = choose_frames(clip, num_frames=40, frames=keyframe(1.0))
    assert sum(199 <= p <= 240 for p in choice.pictures) >= 20
