"""The choice of frames: right counts, right pictures, no floating point surprises."""

from __future__ import annotations

import dataclasses
import statistics
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from pipeline.choice import ONE
from pipeline.frames import choose_frames, frame_weights, num_available, num_clips
from pipeline.timeline import Timeline
from schemas.config import AT_A_RATE, FramesConfig
from schemas.errors import ClipError
from tests.pipeline.timelines import any_timeline, constant, rounded, timeline, variable

UNIFORM = FramesConfig(policy="uniform")
NUM_FRAMES = st.integers(1, 80)


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


POLICIES = [
    {"policy": "uniform"},
    {"policy": "keyframe", "boost": 2.0},
    {"policy": "fps", "target_fps": 8.0},
    {"policy": "fps", "target_fps": 29.97},
    {"policy": "fps", "target_fps": 0.1},
    {"policy": "contiguous", "target_fps": 8.0},
    {"policy": "cogvideox_floor"},
    {"policy": "cogvideox_sat"},
    {"policy": "finetrainers_linspace"},
    {"policy": "ttt_exact"},
    {"policy": "latentsync_contiguous"},
]


@given(
    any_timeline(),
    NUM_FRAMES,
    st.sampled_from(["interpolate", "nearest", "repeat_last"]),
    st.sampled_from(POLICIES),
)
def test_any_clip_gives_the_right_number_of_frames_in_order(
    clip: Timeline, num_frames: int, short: str, policy: dict[str, object]
) -> None:
    frames = FramesConfig.model_validate({**policy, "short": short})
    try:
        choice = choose_frames(clip, num_frames=num_frames, frames=frames)
    except ClipError as error:
        event(error.reason)
        if error.reason not in ("policy_error", "policy_refused"):
            raise
        return
    event(str(policy["policy"]))
    assert len(choice.pictures) == len(choice.blends) == len(choice.ticks) == num_frames
    assert choice.pictures[0] == 0 or "cogvideox_sat" in policy.values() or "latentsync" in str(policy)
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


def rate(policy: str, target_fps: float, **more: object) -> FramesConfig:
    return FramesConfig.model_validate({"policy": policy, "target_fps": target_fps, **more})


def test_what_a_bucket_can_count_on() -> None:
    clip = timeline([i * 40 for i in range(75)], last=40)
    assert num_available(clip, frames=UNIFORM) == 75
    assert num_available(clip, frames=rate("fps", 8.0)) == 24
    assert num_available(clip, frames=rate("fps", 8.1)) == 25
    assert num_available(clip, frames=rate("contiguous", 8.0)) == 25
    assert num_available(timeline([0], last=10), frames=rate("fps", 8.0)) == 1


@given(any_timeline(), NUM_FRAMES, st.sampled_from([0.5, 8.0, 29.97, 60.0]), st.sampled_from(AT_A_RATE))
def test_what_is_available_is_never_filled_up(
    clip: Timeline, num_frames: int, target_fps: float, policy: str
) -> None:
    frames = rate(policy, target_fps, short="drop")
    available = num_available(clip, frames=frames)
    event(f"enough: {available >= num_frames}")
    if available >= num_frames:
        assert len(choose_frames(clip, num_frames=num_frames, frames=frames).pictures) == num_frames
    else:
        with pytest.raises(ClipError, match=f"^{available} picture"):
            choose_frames(clip, num_frames=num_frames, frames=frames)


@given(any_timeline(), st.sampled_from([1.0, 5.0, 8.0, 25.0, 60.0]), NUM_FRAMES)
def test_contiguous_keeps_one_stride_and_repeats_nothing(
    clip: Timeline, target_fps: float, num_frames: int
) -> None:
    frames = rate("contiguous", target_fps)
    assume(num_available(clip, frames=frames) >= num_frames > 1)
    choice = choose_frames(clip, num_frames=num_frames, frames=frames)
    (stride,) = {b - a for a, b in pairwise(choice.pictures)}
    ratio = clip.fps / target_fps
    assert stride == 1 or abs(stride - ratio) <= 0.5 + 1e-6 * ratio
    assert choice.step == stride * clip.interval


def test_contiguous_has_the_nearest_rate_the_source_allows() -> None:
    film = rounded(Fraction(24000, 1001), 240)
    choice = choose_frames(film, num_frames=49, frames=rate("contiguous", 8.0))
    assert choice.pictures == tuple(range(0, 147, 3))
    assert float(1 / (choice.step * film.time_base)) == pytest.approx(24000 / 1001 / 3, rel=1e-4)
    slow = choose_frames(film, num_frames=49, frames=rate("contiguous", 60.0))
    assert slow.pictures == tuple(range(49))


@given(
    any_timeline(),
    st.sampled_from([1.0, 8.0, 29.97]),
    st.integers(1, 30),
    st.integers(1, 40),
    st.sampled_from(AT_A_RATE),
)
def test_chunks_tile_and_slides_step_through_one_sequence(
    clip: Timeline, target_fps: float, num_frames: int, slide_step: int, policy: str
) -> None:
    available = num_available(clip, frames=rate(policy, target_fps))
    assume(available >= num_frames)
    whole = choose_frames(clip, num_frames=available, frames=rate(policy, target_fps))
    for clips, step in (("chunk", num_frames), ("slide", slide_step)):
        frames = rate(policy, target_fps, clips=clips, slide_step=slide_step)
        count = num_clips(clip, num_frames=num_frames, frames=frames)
        # All full clips, and no room for another.
        assert (count - 1) * step + num_frames <= available < count * step + num_frames
        for k in {0, count // 2, count - 1}:
            part = choose_frames(clip, num_frames=num_frames, frames=frames, clip=k)
            assert part.pictures == whole.pictures[k * step : k * step + num_frames]
            assert part.coverage == pytest.approx(
                min(1.0, float(num_frames * whole.step / (clip.end - clip.pts[0])))
            )
        with pytest.raises(ClipError, match=f"clip {count} .* makes {count}$") as caught:
            choose_frames(clip, num_frames=num_frames, frames=frames, clip=count)
        assert caught.value.reason == "too_short"
        event(f"several {clips} clips: {count > 1}")


def test_chunks_and_slides_by_example() -> None:
    clip = timeline([i * 40 for i in range(250)], last=40)  # 10 s at 25 fps: 80 frames at 8 fps
    chunk = rate("fps", 8.0, clips="chunk")
    assert num_clips(clip, num_frames=25, frames=chunk) == 3
    second = choose_frames(clip, num_frames=25, frames=chunk, clip=1)
    assert second.pictures == tuple(i * 25 // 8 for i in range(25, 50))
    assert second.coverage == pytest.approx(25 / 80)
    slide = rate("fps", 8.0, clips="slide", slide_step=10)
    assert num_clips(clip, num_frames=25, frames=slide) == 6
    assert choose_frames(clip, num_frames=25, frames=slide, clip=5).pictures[0] == 50 * 25 // 8
    weights = frame_weights(second, clip)
    assert weights == [1.0] * 25


@pytest.mark.parametrize("clips", ["chunk", "slide"])
def test_a_row_too_short_for_a_full_clip_makes_one(clips: str) -> None:
    clip = timeline([i * 40 for i in range(25)], last=40)
    frames = rate("fps", 8.0, clips=clips)
    assert num_clips(clip, num_frames=49, frames=frames) == 1
    assert len(choose_frames(clip, num_frames=49, frames=frames).interpolated) > 0
    with pytest.raises(ClipError) as caught:
        choose_frames(clip, num_frames=49, frames=rate("fps", 8.0, clips=clips, short="drop"))
    assert caught.value.reason == "too_short"


def test_the_rounding_of_ticks_makes_no_extra_clip() -> None:
    clip = rounded(Fraction(24), 96)
    frames = rate("fps", 24.0, clips="chunk")
    assert num_available(clip, frames=frames) == 96
    assert num_clips(clip, num_frames=48, frames=frames) == 2
    last = choose_frames(clip, num_frames=48, frames=frames, clip=1)
    assert last.pictures == tuple(range(48, 96))
