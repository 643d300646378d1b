"""Stages, learning rate and windows are plain arithmetic with exact answers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.bucket import Geometry
from schemas.config import LrConfig, StageConfig
from schemas.errors import ConfigError
from trainer.curriculum import lr_at, prefix_frames, stage_at, total_steps

STAGES = tuple(
    StageConfig(name=name, steps=steps, lr=LrConfig(peak=1.0))
    for name, steps in (("a", 3), ("b", 1), ("c", 2))
)


GEOMETRY = Geometry(temporal=4, spatial=8, channels=16)


def test_every_step_belongs_to_one_stage_in_order() -> None:
    found = [(stage.name, inside) for stage, inside in (stage_at(step, STAGES) for step in range(6))]
    assert found == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("c", 0), ("c", 1)]
    assert total_steps(STAGES) == 6


@pytest.mark.parametrize("step", [-1, 6])
def test_a_step_outside_the_run_says_where_it_ends(step: int) -> None:
    with pytest.raises(ConfigError, match=rf"step = {step} is outside .* 3 stages have steps 0 to 5"):
        stage_at(step, STAGES)


def test_warmup_then_cosine_to_zero() -> None:
    lr = LrConfig(peak=8.0, warmup=4)
    rates = [lr_at(step, lr, steps=12) for step in range(13)]
    assert rates[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert rates[8] == pytest.approx(4.0)
    assert rates[12] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in pairwise(rates[4:]))


def test_constant_stays_at_its_peak() -> None:
    lr = LrConfig(peak=3.0, warmup=2, kind="constant")
    assert [lr_at(step, lr, steps=5) for step in range(5)] == [1.5, 3.0, 3.0, 3.0, 3.0]


def prefix(pts_s: list[float], max_s: float, geometry: Geometry = GEOMETRY) -> int:
    return int(prefix_frames(np.array(pts_s), np.array([0, len(pts_s)]), max_s=max_s, geometry=geometry)[0])


def test_the_windows_of_a_16_fps_curriculum() -> None:
    pts = [i / 16 for i in range(63 * 16 + 1)]
    assert [prefix(pts, seconds) for seconds in (3.0, 9.0, 18.0, 30.0, 63.0)] == [13, 37, 73, 121, 253]


@pytest.mark.parametrize(
    ("max_s", "frames"),
    [(0.01, 1), (0.4, 1), (0.5, 2), (0.93, 2), (0.94, 3), (1.0, 3), (50.0, 4)],
)
def test_a_window_ends_with_the_last_whole_latent_frame(max_s: float, frames: int) -> None:
    pts = [7.0 + i / 8 for i in range(13)]  # latent frames end 0, 0.5, 1.0 and 1.5 s after the first picture
    assert prefix(pts, max_s) == frames


def test_a_window_follows_the_frame_rule_of_the_encoder() -> None:
    pts = [i / 8 for i in range(40)]
    groups = replace(GEOMETRY, causal=False)  # latent frames end with frames 3, 7, 11 ...
    assert [prefix(pts, seconds, groups) for seconds in (0.1, 0.375, 0.8, 0.875, 9.0)] == [1, 1, 1, 2, 10]
    pieces = replace(GEOMETRY, segment_frames=5)  # with 0, 4; 5, 9; 10, 14 ...
    assert [prefix(pts, seconds, pieces) for seconds in (0.1, 0.5, 0.625, 1.125, 9.0)] == [1, 2, 3, 4, 16]


@given(
    st.builds(
        Geometry, temporal=st.integers(1, 8), spatial=st.just(8), channels=st.just(4), causal=st.booleans()
    ),
    st.integers(0, 6),
    st.integers(1, 6),
)
def test_as_many_latent_frames_end_in_a_clip_as_it_has(geometry: Geometry, more: int, pieces: int) -> None:
    piece = (more + 1 - geometry.causal) * geometry.temporal + geometry.causal
    for whole in (geometry, replace(geometry, segment_frames=piece)):
        num_frames = piece * pieces if whole.segment_frames or not geometry.causal else piece
        assert whole.ends_latent(np.arange(num_frames)).sum() == whole.latent_frames(num_frames)
        assert whole.ends_latent(num_frames - 1)


def test_rounded_times_do_not_cost_a_latent_frame() -> None:
    pts = [round(i / 8, 3) + (0.001 if i == 8 else 0) for i in range(13)]
    assert prefix(pts, 1.0) == 3


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.floats(0.01, 1.0), max_size=20).map(lambda steps: np.cumsum([2.0, *steps]).tolist()),
        min_size=1,
        max_size=8,
    ),
    st.floats(0.05, 9.0),
)
def test_many_clips_at_once_equal_one_at_a_time(clips: list[list[float]], max_s: float) -> None:
    offsets = np.cumsum([0, *map(len, clips)])
    together = prefix_frames(np.concatenate(clips), offsets, max_s=max_s, geometry=GEOMETRY)
    assert together.tolist() == [prefix(clip, max_s) for clip in clips]
    assert all(1 <= frames <= (len(clip) - 1) // 4 + 1 for frames, clip in zip(together, clips, strict=True))
