"""Windows of clips: frames by their own times, whatever is on screen; counts that the encoder takes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.bucket import Geometry
from schemas.config import FramesConfig, Policy
from schemas.windows import durations, elapsed, first_pixel_frame, latents_of, prefix_frames

GEOMETRY = Geometry(temporal=4, spatial=8, channels=16)
EVERY = Geometry(temporal=1, spatial=8, channels=16)
CURRICULUM = {3.0: 49, 9.0: 145, 18.0: 289, 30.0: 481, 63.0: 1009}
POLICIES: tuple[Policy, ...] = get_args(Policy)
AT_A_RATE = FramesConfig(policy="fps")


def prefix(
    pts_s: list[float],
    max_s: float,
    geometry: Geometry = GEOMETRY,
    *,
    fps: float,
    frames: FramesConfig | None = AT_A_RATE,
) -> int:
    found = prefix_frames(
        np.array(pts_s),
        np.array([0, len(pts_s)]),
        fps=np.array([fps]),
        max_s=max_s,
        frames=frames,
        geometry=geometry,
    )
    return int(found[0])


@pytest.mark.parametrize("frames", [None, *(FramesConfig(policy=policy) for policy in POLICIES)])
def test_the_windows_of_a_16_fps_curriculum(frames: FramesConfig | None) -> None:
    pts = [i / 16 for i in range(63 * 16 + 1)]
    assert {max_s: prefix(pts, max_s, fps=16.0, frames=frames) for max_s in CURRICULUM} == CURRICULUM


@pytest.mark.parametrize("policy", ["uniform", "fps"])
@pytest.mark.parametrize("source_fps", [0.5, 1, 3, 7, 24, 60])
def test_a_window_is_as_long_whatever_the_source_shows(policy: Policy, source_fps: float) -> None:
    pts = [math.floor(i / 16 * source_fps + 1e-9) / source_fps for i in range(1009)]
    frames = FramesConfig(policy=policy)
    assert {max_s: prefix(pts, max_s, fps=16.0, frames=frames) for max_s in CURRICULUM} == CURRICULUM


def test_a_gap_is_time_like_any_other() -> None:
    """Nothing new between 2.5 and 5 s; also where the clip begins with it, as the second of a row may."""
    for start in (0.0, 4.875):
        own = [start + i / 16 for i in range(289)]
        assert prefix([2.5 if 2.5 < t < 5 else t for t in own], 3.0, fps=16.0) == 49


def test_pictures_taken_for_themselves_keep_their_own_times() -> None:
    """At 8 fps for a second, then at 2, a mean of 4 over the 17 pictures."""
    pts = [i / 8 for i in range(8)] + [1 + i / 2 for i in range(9)]
    assert [prefix(pts, 2.0, EVERY, fps=4.0, frames=FramesConfig(policy=p)) for p in POLICIES] == [
        9 if p in ("uniform", "fps") else 11 for p in POLICIES
    ]


def test_repeats_that_fill_up_are_no_part_of_a_shorter_window() -> None:
    """One second of pictures, and the last one repeated up to 6."""
    pts = [min(i, 8) / 8 for i in range(49)]
    for policy in POLICIES:
        found = [prefix(pts, s, fps=8.0, frames=FramesConfig(policy=policy)) for s in (1.0, 3.0, 6.0)]
        assert found == [9, 25, 49]


@pytest.mark.parametrize(
    ("max_s", "num_frames"),
    [(0.01, 1), (0.4, 1), (0.5, 5), (0.93, 5), (0.94, 9), (1.0, 9), (50.0, 13)],
)
def test_a_window_ends_with_the_last_whole_latent_frame(max_s: float, num_frames: int) -> None:
    pts = [7.0 + i / 8 for i in range(13)]
    assert prefix(pts, max_s, fps=8.0) == num_frames


def test_a_window_is_a_clip_that_the_encoder_takes() -> None:
    pts = [i / 8 for i in range(40)]
    groups = replace(GEOMETRY, causal=False)
    assert [prefix(pts, s, groups, fps=8.0) for s in (0.1, 0.375, 0.8, 0.875, 9.0)] == [4, 4, 4, 8, 40]
    pieces = replace(GEOMETRY, segment_frames=5)
    assert [prefix(pts, s, pieces, fps=8.0) for s in (0.1, 0.5, 1.05, 1.125, 9.0)] == [5, 5, 5, 10, 40]
    covered = Geometry(4, 8, 4, causal=False, windows=((24, 16), (64, 32), (64, 32)))
    assert [prefix(pts, s, covered, fps=8.0) for s in (0.1, 3.0, 4.8, 4.875)] == [24, 24, 24, 40]
    assert prefix([i / 8.3 for i in range(101)], 3.0, fps=8.3) == 25


def test_rounded_times_do_not_cost_a_latent_frame() -> None:
    pts = [round(i / 8, 3) + (0.001 if i == 8 else 0) for i in range(13)]
    assert prefix(pts, 1.0, fps=8.0, frames=FramesConfig(policy="contiguous")) == 9


CLIPS = st.lists(
    st.lists(st.sampled_from([0.0, 0.01, 0.1, 1.0]), max_size=20).map(
        lambda steps: np.cumsum([2.0, *steps]).tolist()
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(CLIPS, st.floats(0.05, 9.0), st.sampled_from(POLICIES), st.floats(0.5, 60.0))
def test_many_clips_at_once_equal_one_at_a_time(
    clips: list[list[float]], max_s: float, policy: Policy, fps: float
) -> None:
    frames = FramesConfig(policy=policy)
    rates = np.array([fps + i for i in range(len(clips))])
    together = prefix_frames(
        np.concatenate(clips),
        np.cumsum([0, *map(len, clips)]),
        fps=rates,
        max_s=max_s,
        frames=frames,
        geometry=EVERY,
    )
    alone = [prefix(clip, max_s, EVERY, fps=r, frames=frames) for clip, r in zip(clips, rates, strict=True)]
    assert together.tolist() == alone
    assert all(1 <= found <= len(clip) for found, clip in zip(alone, clips, strict=True))


@pytest.mark.parametrize("frames", [None, AT_A_RATE, FramesConfig(policy="contiguous")])
def test_a_clip_lasts_from_its_first_frame_to_its_last(frames: FramesConfig | None) -> None:
    pts_s = np.array([0.0, 0.5, 1.5, 4.0, 10.0, 10.0, 10.0])
    offsets, fps = np.array([0, 4, 7]), np.array([2.0, 4.0])
    given_ = {"fps": fps, "frames": frames}
    times = elapsed(pts_s, offsets, **given_)  # type: ignore[arg-type]
    even = frames is None or frames is AT_A_RATE
    # A picture that is repeated to fill up counts on from there, a frame each at the clip's rate.
    assert times.tolist() == [*([0, 0.5, 1.0, 1.5] if even else [0, 0.5, 1.5, 4.0]), 0, 0.25, 0.5]
    assert durations(pts_s, offsets, **given_).tolist() == times[[3, 6]].tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "geometry",
    [
        GEOMETRY,
        EVERY,
        Geometry(temporal=8, spatial=8, channels=16, causal=False),
        Geometry(temporal=4, spatial=8, channels=16, segment_frames=9),
        Geometry(temporal=4, spatial=8, channels=16, causal=False, segment_frames=12),
    ],
)
def test_latent_frames_share_out_the_pixel_frames(geometry: Geometry) -> None:
    count = geometry.frame_least + 6 * geometry.frame_step
    latents = int(latents_of(np.array([count]), geometry)[0])
    starts = [first_pixel_frame(at, geometry) for at in range(latents + 1)]
    assert starts[0] == 0
    assert starts[-1] == count
    assert set(np.diff(starts)) <= {1, geometry.temporal}
    # A shorter window from the beginning has the frames that an encoder would take for it.
    for shorter in range(geometry.frame_least, count, geometry.frame_step):
        assert starts[geometry.latent_frames(shorter)] == shorter


def test_counts_that_an_encoder_does_not_take_have_no_latents() -> None:
    assert latents_of(np.array([1, 2, 5, 5, 8]), GEOMETRY).tolist() == [1, 0, 2, 2, 0]
