"""The choice of frames: right counts, right pictures, no floating point surprises."""

from __future__ import annotations

import dataclasses
import statistics
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from pipeline.clip import ClipInfo
from pipeline.frames import (
    ONE,
    check_window,
    choose_frames,
    frame_weights,
    hard_cuts,
    num_available,
    unblended_at,
)
from pipeline.timeline import Timeline
from schemas.config import FramesConfig
from schemas.errors import ClipError, RunError

UNIFORM = FramesConfig(policy="uniform")
NUM_FRAMES = st.integers(1, 80)


def timeline(pts: list[int], *, last: int = 1, tick: Fraction = Fraction(1, 1000)) -> Timeline:
    sizes, keys = (100,) * len(pts), (True,) + (False,) * (len(pts) - 1)
    return Timeline(tick, pts[0], tuple(pts), pts[-1] + last, sizes, keys)


@st.composite
def constant(draw: st.DrawFn, max_pictures: int = 400) -> Timeline:
    interval, count = draw(st.integers(1, 5000)), draw(st.integers(1, max_pictures))
    start = draw(st.integers(-1000, 100_000))
    return timeline([start + i * interval for i in range(count)], last=interval)


@st.composite
def variable(draw: st.DrawFn) -> Timeline:
    gaps = draw(st.lists(st.integers(1, 3000), min_size=3, max_size=120))
    pts = [draw(st.integers(-500, 500))]
    for gap in gaps[:-1]:
        pts.append(pts[-1] + gap)
    return timeline(pts, last=gaps[-1])


def rounded(fps: Fraction, count: int) -> Timeline:
    """A constant rate stored in whole milliseconds, as Matroska and FLV do."""
    return timeline([round(i * 1000 / fps) for i in range(count)], last=round(1000 / fps))


@given(constant(), NUM_FRAMES)
def test_uniform_at_a_constant_rate_is_floor_of_i_times_stride(clip: Timeline, num_frames: int) -> None:
    count = len(clip.pts)
    assume(count >= num_frames)
    choice = choose_frames(clip, num_frames=num_frames, frames=UNIFORM)
    assert list(choice.pictures) == [i * count // num_frames for i in range(num_frames)]
    assert choice.coverage == 1.0
    event(f"strides: {count > num_frames}")


@given(variable(), st.integers(1, 20))
def test_uniform_takes_the_picture_on_screen(clip: Timeline, num_frames: int) -> None:
    count = len(clip.pts)
    assume(clip.grid is None)
    num_frames = min(num_frames, count - 1)
    choice = choose_frames(clip, num_frames=num_frames, frames=UNIFORM)
    for i, picture in enumerate(choice.pictures):
        tick = clip.pts[0] + Fraction(i * (clip.end - clip.pts[0]), num_frames)
        assert clip.pts[picture] <= tick
        assert tick < (clip.pts[picture + 1] if picture + 1 < count else clip.end)


@given(st.one_of(constant(), variable()), NUM_FRAMES, st.sampled_from(["interpolate", "repeat_last"]))
def test_any_clip_gives_the_right_number_of_frames_in_order(
    clip: Timeline, num_frames: int, short: str
) -> None:
    for policy, target_fps in (("uniform", 8.0), ("fps", 8.0), ("fps", 29.97), ("fps", 0.1)):
        frames = FramesConfig.model_validate({"policy": policy, "target_fps": target_fps, "short": short})
        choice = choose_frames(clip, num_frames=num_frames, frames=frames)
        assert len(choice.pictures) == len(choice.blends) == len(choice.ticks) == num_frames
        assert choice.pictures[0] == 0
        assert list(choice.pictures) == sorted(choice.pictures)
        assert list(choice.ticks) == sorted(choice.ticks)
        assert choice.needed[-1] < len(clip.pts)
        assert all(0 <= blend < ONE for blend in choice.blends)
        assert 0 < choice.coverage <= 1
        weights = frame_weights(choice, clip)
        assert statistics.fmean(weights) == pytest.approx(1.0, abs=1e-3)


@given(st.one_of(constant(80), variable()))
def test_as_many_pictures_as_frames_takes_each_once(clip: Timeline) -> None:
    choice = choose_frames(clip, num_frames=len(clip.pts), frames=UNIFORM)
    assert list(choice.pictures) == list(range(len(clip.pts)))


@pytest.mark.parametrize(
    "fps", [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(60)]
)
def test_timestamps_rounded_to_milliseconds_are_a_constant_rate(fps: Fraction) -> None:
    for count in (30, 49, 50, 97, 250, 2000):
        clip = rounded(fps, count)
        for num_frames in (2, 17, 30, 49):
            if num_frames <= count:
                choice = choose_frames(clip, num_frames=num_frames, frames=UNIFORM)
                assert list(choice.pictures) == [i * count // num_frames for i in range(num_frames)]
        for divisor in (1, 2, 3):
            frames = FramesConfig(policy="fps", target_fps=round(float(fps), 3) / divisor)
            choice = choose_frames(clip, num_frames=count // divisor, frames=frames)
            assert list(choice.pictures) == list(range(0, count - divisor + 1, divisor))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 300), NUM_FRAMES)
def test_fps_at_a_constant_rate_is_floor_of_i_times_the_ratio(
    fps: int, target: int, count: int, num_frames: int
) -> None:
    clip = timeline([i * 360 for i in range(count)], last=360, tick=Fraction(1, 360 * fps))
    frames = FramesConfig(policy="fps", target_fps=float(target), short="drop")
    wanted = [i * fps // target for i in range(num_frames)]
    if wanted[-1] >= count:
        with pytest.raises(ClipError) as caught:
            choose_frames(clip, num_frames=num_frames, frames=frames)
        assert caught.value.reason == "too_short"
        return
    choice = choose_frames(clip, num_frames=num_frames, frames=frames)
    assert list(choice.pictures) == wanted
    assert choice.coverage == pytest.approx(min(1.0, num_frames / target / (count / fps)))


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


def test_a_time_on_a_picture_is_that_picture_and_between_two_is_their_blend() -> None:
    choice = choose_frames(timeline([0, 40, 80], last=40), num_frames=5, frames=UNIFORM)
    assert choice.pictures == (0, 0, 1, 1, 2)
    assert choice.blends == (0, 128, 0, 128, 0)
    assert choice.interpolated == [1, 3]
    assert choice.duplicated == []
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


def test_too_few_pictures_by_rule() -> None:
    clip = timeline([0, 40, 80], last=40)
    repeated = choose_frames(clip, num_frames=5, frames=FramesConfig(short="repeat_last"))
    assert repeated.pictures == (0, 1, 2, 2, 2)
    assert repeated.duplicated == [3, 4]
    assert repeated.step == 40
    with pytest.raises(ClipError, match="3 pictures") as caught:
        choose_frames(clip, num_frames=5, frames=FramesConfig(short="drop"))
    assert caught.value.reason == "too_short"
    with pytest.raises(RunError, match="5 frames are wanted"):
        choose_frames(clip, num_frames=5, frames=FramesConfig(short="error"))


def test_a_clip_too_short_at_its_target_rate_uses_the_pictures_it_has() -> None:
    clip = timeline([i * 40 for i in range(75)], last=40)
    choice = choose_frames(clip, num_frames=49, frames=FramesConfig(policy="fps", target_fps=8.0))
    assert choice.interpolated == []
    assert choice.pictures == tuple(i * 75 // 49 for i in range(49))


@given(st.one_of(constant(), variable()), st.lists(st.integers(0, 20_000), min_size=1, max_size=4))
def test_adjoining_windows_share_out_the_pictures(clip: Timeline, edges_ms: list[int]) -> None:
    edges = [None, *sorted(edge / 1000 for edge in set(edges_ms)), None]
    found: list[int] = []
    for start_s, end_s in pairwise(edges):
        first = clip.origin + round(Fraction(repr(start_s or 0.0)) / clip.time_base)
        last = clip.end if end_s is None else clip.origin + round(Fraction(repr(end_s)) / clip.time_base)
        if not any(first <= tick < last for tick in clip.pts):
            with pytest.raises(ClipError) as caught:
                clip.window(start_s, end_s)
            assert caught.value.reason == "empty_window"
            continue
        part = clip.window(start_s, end_s)
        found += part.pts
        assert part.pts[-1] < part.end <= clip.end
    assert found == list(clip.pts)


def test_a_window_means_the_decimal_that_was_written() -> None:
    clip = timeline([0, 100, 200, 300, 400], last=100)
    assert clip.window(0.1, 0.3).pts == (100, 200)  # 0.1 and 0.3 are no binary numbers
    assert clip.window(0.1, 0.3).end == 300
    assert clip.window(0.25, None).pts == (300, 400)
    assert clip.window(0.25, None).seconds(300) == 0.3
    with pytest.raises(ClipError, match=r"from 0 s to 0\.400 s"):
        clip.window(0.41, 0.45)


def test_frames_that_carry_more_change_weigh_more() -> None:
    clip = timeline([i * 40 for i in range(12)], last=40)
    clip = dataclasses.replace(clip, sizes=(900,) + (100,) * 5 + (190,) * 3 + (100,) * 3)
    weights = frame_weights(choose_frames(clip, num_frames=4, frames=UNIFORM), clip)
    # Frames stand for pictures 0, 1-3, 4-6, 7-9: the key frame's size counts against other key frames.
    assert weights[0] == weights[1] < weights[2] < weights[3]


def test_what_a_bucket_can_count_on() -> None:
    assert num_available(3.0, 75, frames=UNIFORM) == 75
    assert num_available(3.0, 75, frames=FramesConfig(policy="fps", target_fps=8.0)) == 24
    assert num_available(0.01, 1, frames=FramesConfig(policy="fps", target_fps=8.0)) == 1


@pytest.mark.parametrize(("start_s", "end_s"), [(5.0, None), (7.0, 9.0), (2.0, 2.0), (3.0, 1.0)])
def test_a_window_outside_the_clip_is_refused(start_s: float, end_s: float | None) -> None:
    facts = {field.name: 0 for field in dataclasses.fields(ClipInfo)} | {"duration_s": 5.0}
    info = ClipInfo(**facts)  # type: ignore[arg-type]
    check_window(info, start_s=None, end_s=None)
    check_window(info, start_s=4.9, end_s=9.0)
    with pytest.raises(ClipError) as caught:
        check_window(info, start_s=start_s, end_s=end_s)
    assert caught.value.reason == "empty_window"
