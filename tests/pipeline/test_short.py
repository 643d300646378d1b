"""Too few pictures: blended, repeated or refused as asked, and never across a cut or a gap."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from pipeline.choice import ONE, repeats
from pipeline.frames import choose_frames
from pipeline.short import hard_cuts, unblended_at
from pipeline.timeline import Timeline
from schemas.config import FramesConfig
from schemas.errors import ClipError, RunError
from tests.pipeline.timelines import any_timeline, constant, timeline, variable

UNIFORM = FramesConfig(policy="uniform")


@given(st.one_of(constant(60), variable()), st.integers(2, 80))
def test_interpolation_runs_evenly_from_the_first_to_the_last_picture(
    clip: Timeline, num_frames: int
) -> None:
    assume(len(clip.pts) < num_frames)
    choice = choose_frames(clip, num_frames=num_frames, frames=UNIFORM)
    assert (choice.pictures[0], choice.blends[0]) == (0, 0)
    assert (choice.pictures[-1], choice.blends[-1]) == (len(clip.pts) - 1, 0)
    for i in choice.interpolated:
        before, after = clip.pts[choice.pictures[i]], clip.pts[choice.pictures[i] + 1]
        tick = clip.pts[0] + i * Fraction(clip.pts[-1] - clip.pts[0], num_frames - 1)
        assert choice.ticks[i] == tick
        assert abs(choice.blends[i] - ONE * (tick - before) / (after - before)) <= Fraction(1, 2)
    event(f"blends: {bool(choice.interpolated)}")


@given(any_timeline(), st.integers(2, 120))
def test_nearest_shows_the_picture_nearest_in_time(clip: Timeline, num_frames: int) -> None:
    assume(len(clip.pts) < num_frames)
    choice = choose_frames(clip, num_frames=num_frames, frames=FramesConfig(short="nearest"))
    assert choice.interpolated == []
    assert len(repeats(choice.pictures, choice.blends)) == num_frames - len(set(choice.pictures))
    assert repeats(choice.pictures, choice.blends)
    for i, picture in enumerate(choice.pictures):
        tick = clip.pts[0] + i * Fraction(clip.pts[-1] - clip.pts[0], num_frames - 1)
        assert abs(clip.pts[picture] - tick) == min(abs(other - tick) for other in clip.pts)


def test_a_time_on_a_picture_is_that_picture_and_between_two_is_their_blend() -> None:
    choice = choose_frames(timeline([0, 40, 80], last=40), num_frames=5, frames=UNIFORM)
    assert choice.pictures == (0, 0, 1, 1, 2)
    assert choice.blends == (0, 128, 0, 128, 0)
    assert choice.interpolated == [1, 3]
    assert repeats(choice.pictures, choice.blends) == []
    assert choice.needed == [0, 1, 2]


def test_nothing_is_blended_over_a_gap() -> None:
    clip = timeline([0, 40, 80, 120, 1000, 1040], last=40)
    choice = choose_frames(clip, num_frames=14, frames=UNIFORM)
    for picture, blend in zip(choice.pictures, choice.blends, strict=True):
        assert not (picture == 3 and blend)
    assert {3, 4} <= set(choice.pictures)


def test_hard_cuts_are_not_blended() -> None:
    clip = timeline([0, 40, 80, 120], last=40)
    choice = choose_frames(clip, num_frames=11, frames=UNIFORM)
    cuts = hard_cuts({0: 4.0, 1: 70.0, 2: 6.0})
    assert cuts == {1}
    cut = unblended_at(choice, cuts, timeline=clip)
    touched = [i for i in range(11) if choice.pictures[i] == 1 and choice.blends[i]]
    assert touched
    for i in range(11):
        if i in touched:
            assert cut.blends[i] == 0
            assert cut.pictures[i] == (2 if choice.blends[i] >= ONE / 2 else 1)
            assert cut.ticks[i] == clip.pts[cut.pictures[i]]
        else:
            assert (cut.pictures[i], cut.blends[i]) == (choice.pictures[i], choice.blends[i])


def test_fast_motion_everywhere_is_no_cut() -> None:
    assert hard_cuts({0: 30.0, 1: 35.0, 2: 28.0}) == set()
    assert hard_cuts({}) == set()
    # Few differences: one is measured by the others, and none of them makes a cut of this size usual.
    assert hard_cuts({0: 200.0}) == hard_cuts({0: 200.0, 1: 190.0}) - {1} == {0}
    assert hard_cuts({0: 0.0, 1: 200.0, 2: 180.0, 3: 0.0}) == {1, 2}
    assert hard_cuts({0: 30.0, 1: 31.0, 2: 120.0, 3: 32.0}) == {2}


def test_a_gap_is_measured_by_the_other_intervals() -> None:
    clip = timeline([0, 125, 10_000], last=40)
    choice = choose_frames(clip, num_frames=9, frames=FramesConfig())
    assert set(choice.pictures) == {0, 1, 2}
    assert choice.interpolated == []
    pair = choose_frames(timeline([0, 10_000], last=40), num_frames=9, frames=FramesConfig())
    assert pair.interpolated == []
    assert choose_frames(timeline([0, 40], last=40), num_frames=9, frames=FramesConfig()).interpolated


@pytest.mark.parametrize("policy", ["uniform", "keyframe"])
def test_too_few_pictures_by_rule(policy: str) -> None:
    clip = timeline([0, 40, 80], last=40)

    def config(short: str) -> FramesConfig:
        return FramesConfig.model_validate({"policy": policy, "short": short})

    repeated = choose_frames(clip, num_frames=5, frames=config("repeat_last"))
    assert repeated.pictures == (0, 1, 2, 2, 2)
    assert repeats(repeated.pictures, repeated.blends) == [3, 4]
    assert repeated.step == 40
    nearest = choose_frames(clip, num_frames=7, frames=config("nearest"))
    assert nearest.pictures == (0, 0, 1, 1, 1, 2, 2)
    assert repeats(nearest.pictures, nearest.blends) == [1, 3, 4, 6]
    with pytest.raises(ClipError, match="3 pictures") as caught:
        choose_frames(clip, num_frames=5, frames=config("drop"))
    assert caught.value.reason == "too_short"
    with pytest.raises(RunError, match="5 frames are wanted"):
        choose_frames(clip, num_frames=5, frames=config("error"))


@pytest.mark.parametrize("policy", ["fps", "contiguous"])
def test_a_clip_too_short_at_its_target_rate_uses_the_pictures_it_has(policy: str) -> None:
    clip = timeline([i * 40 for i in range(75)], last=40)
    frames = FramesConfig.model_validate({"policy": policy, "target_fps": 8.0})
    choice = choose_frames(clip, num_frames=49, frames=frames)
    assert choice.interpolated == []
    assert choice.pictures == tuple(i * 75 // 49 for i in range(49))


def test_more_than_twice_as_slow_is_told() -> None:
    clip = timeline([i * 40 for i in range(24)], last=40)
    assert choose_frames(clip, num_frames=48, frames=UNIFORM).notes == ()
    told = choose_frames(clip, num_frames=49, frames=UNIFORM).notes
    assert told == ("24 pictures stretched over 49 frames, 2.0 times slower",)
    at_a_rate = FramesConfig(policy="fps", target_fps=5.0)
    assert choose_frames(clip, num_frames=11, frames=at_a_rate).notes == (
        "5 pictures at 5 fps stretched over 11 frames, 2.2 times slower",
    )


@pytest.mark.parametrize("short", ["interpolate", "nearest", "repeat_last"])
def test_slower_than_allowed_is_refused(short: str) -> None:
    frames = FramesConfig.model_validate({"short": short, "max_slowdown": 1.5})
    clip = timeline([i * 40 for i in range(30)], last=40)
    assert len(choose_frames(clip, num_frames=45, frames=frames).pictures) == 45
    with pytest.raises(
        ClipError, match=r"30 pictures stretched over 46 frames.*max_slowdown = 1\.5"
    ) as caught:
        choose_frames(clip, num_frames=46, frames=frames)
    assert caught.value.reason == "too_short"
