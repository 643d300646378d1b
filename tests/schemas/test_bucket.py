"""Bucket arithmetic: frame rules with their nearest values, the choice by aspect ratio."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.bucket import Geometry, check_buckets, choose_bucket, video_tokens
from schemas.config import BucketConfig
from schemas.errors import ConfigError

COGVIDEOX = Geometry(temporal=4, spatial=8, channels=16)


def bucket(num_frames: int, height: int, width: int) -> BucketConfig:
    return BucketConfig(num_frames=num_frames, height=height, width=width)


def test_cogvideox_arithmetic() -> None:
    shape = COGVIDEOX.latent_shape(bucket(49, 480, 720))
    assert shape == (13, 16, 60, 90)
    assert video_tokens(shape) == 13 * 30 * 45
    assert COGVIDEOX.pixel_frames(13) == 49


@given(st.integers(1, 500))
def test_the_frame_rule_names_the_nearest_valid_counts(num_frames: int) -> None:
    if num_frames % 4 == 1:
        check_buckets([bucket(num_frames, 480, 720)], COGVIDEOX)
        return
    below = (num_frames - 1) // 4 * 4 + 1
    with pytest.raises(ConfigError) as error:
        check_buckets([bucket(num_frames, 480, 720)], COGVIDEOX)
    assert f"buckets.0.num_frames = {num_frames}" in str(error.value)
    assert f"{below} and {below + 4}" in str(error.value)


def test_every_bad_side_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        check_buckets([bucket(49, 480, 720), bucket(49, 100, 7)], COGVIDEOX)
    assert "buckets.1.height = 100: expected a multiple of 16 pixels; nearest 96 and 112" in str(error.value)
    assert "buckets.1.width = 7: expected a multiple of 16 pixels; nearest 16" in str(error.value)


def test_the_nearest_aspect_ratio_wins() -> None:
    buckets = [bucket(49, 480, 720), bucket(49, 720, 480), bucket(49, 560, 560)]
    assert choose_bucket(buckets, width=1920, height=1080, num_pictures=100) == 0
    assert choose_bucket(buckets, width=1080, height=1920, num_pictures=100) == 1
    assert choose_bucket(buckets, width=500, height=520, num_pictures=100) == 2


def test_equal_aspects_prefer_the_most_frames_a_clip_can_fill() -> None:
    buckets = [bucket(25, 480, 720), bucket(49, 480, 720), bucket(81, 480, 720)]
    assert choose_bucket(buckets, width=720, height=480, num_pictures=60) == 1
    assert choose_bucket(buckets, width=720, height=480, num_pictures=500) == 2
    assert choose_bucket(buckets, width=720, height=480, num_pictures=3) == 0


def test_equal_aspects_prefer_the_largest_picture_that_needs_no_enlarging() -> None:
    buckets = [bucket(49, 160, 240), bucket(49, 320, 480), bucket(49, 480, 720)]
    assert choose_bucket(buckets, width=600, height=400, num_pictures=60) == 1
    assert choose_bucket(buckets, width=60, height=40, num_pictures=60) == 0


@given(
    st.lists(
        st.builds(
            bucket,
            st.sampled_from([25, 49]),
            st.sampled_from([160, 240, 480]),
            st.sampled_from([160, 240, 480]),
        ),
        min_size=2,
        max_size=4,
        unique=True,
    ),
    st.integers(16, 2000),
    st.integers(16, 2000),
    st.integers(1, 100),
)
def test_the_order_of_buckets_never_matters(
    buckets: list[BucketConfig], width: int, height: int, pictures: int
) -> None:
    choices = {
        order[choose_bucket(order, width=width, height=height, num_pictures=pictures)]
        for order in itertools.permutations(buckets)
    }
    assert len(choices) == 1
