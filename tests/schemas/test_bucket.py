"""Bucket arithmetic: frame rules with their nearest values, the choice by aspect ratio."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from schemas.bucket import Geometry, check_buckets, choose_bucket, clip_lengths, video_tokens
from schemas.config import BucketConfig, FramesConfig, TargetConfig
from schemas.errors import ConfigError

COGVIDEOX = Geometry(temporal=4, spatial=8, channels=16)


def bucket(num_frames: int, height: int, width: int) -> BucketConfig:
    return BucketConfig(num_frames=num_frames, height=height, width=width)


def test_cogvideox_arithmetic() -> None:
    shape = COGVIDEOX.latent_shape(bucket(49, 480, 720))
    assert shape == (13, 16, 60, 90)
    assert video_tokens(shape) == 13 * 30 * 45


def test_a_frame_leads_where_the_clips_first_alone_has_a_latent_frame_of_its_own() -> None:
    assert COGVIDEOX.leading_frames == 1
    assert replace(COGVIDEOX, causal=False).leading_frames == 0
    assert replace(COGVIDEOX, segment_frames=9).leading_frames == 0


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


def meets_all(num_frames: int, target: TargetConfig, *, temporal: int, text_length: int, side: int) -> bool:
    """The rules once more, from their definitions."""
    if (num_frames - 1) % temporal or (num_frames - 1) % target.frame_multiple:
        return False
    segments = 1
    if target.segment_frames and num_frames - 1 >= target.segment_frames:
        if (num_frames - 1) % target.segment_frames:
            return False
        segments = (num_frames - 1) // target.segment_frames
    latent_frames = (num_frames + temporal - 1) // temporal
    tokens = latent_frames * (side // 16) ** 2 // target.patch_size_t + segments * text_length
    return latent_frames % target.patch_size_t == 0 and tokens % target.token_multiple == 0


TARGETS = st.builds(
    TargetConfig,
    frame_multiple=st.sampled_from([1, 3, 16]),
    patch_size_t=st.sampled_from([1, 2]),
    token_multiple=st.sampled_from([1, 4, 64]),
    segment_frames=st.sampled_from([0, 48]),
)


@settings(max_examples=200)
@given(st.integers(1, 300), TARGETS, st.sampled_from([4, 8]), st.integers(0, 300), st.sampled_from([48, 160]))
def test_the_nearest_values_meet_all_rules_and_none_is_nearer(
    num_frames: int, target: TargetConfig, temporal: int, text_length: int, side: int
) -> None:
    geometry = Geometry(temporal=temporal, spatial=8, channels=16)

    def meets(frames: int, length: int = text_length) -> bool:
        return meets_all(frames, target, temporal=temporal, text_length=length, side=side)

    def check(frames: int, length: int = text_length) -> None:
        check_buckets([bucket(frames, side, side)], geometry, target=target, text_length=length)

    if meets(num_frames):
        check(num_frames)
        return
    with pytest.raises(ConfigError) as error:
        check(num_frames)
    found = re.search(r"; (nearest (?:is|are) ([\d and]+)|no num_frames up to \d+)", str(error.value))
    assert found is not None
    offered = {int(value) for value in re.findall(r"\d+", found[2] or "")}
    below = next((n for n in range(num_frames - 1, 0, -1) if meets(n)), None)
    above = next((n for n in range(num_frames + 1, num_frames + 30_000) if meets(n)), None)
    assert offered == {n for n in (below, above) if n is not None}
    for frames in offered:
        check(frames)

    text = re.search(r"text_encoder.max_length = ([\d or]+)", str(error.value))
    if text is not None:
        lengths = {int(value) for value in re.findall(r"\d+", text[1])}
        near = [n for n in range(1, text_length + 65) if meets(num_frames, n)]
        assert lengths == {
            *(n for n in near if n == max((m for m in near if m < text_length), default=None)),
            *(n for n in near if n == min((m for m in near if m > text_length), default=None)),
        }
        for length in lengths:
            check(num_frames, length)


def test_an_even_latent_count_is_asked_for_by_patch_size_t() -> None:
    target = TargetConfig(patch_size_t=2)
    with pytest.raises(ConfigError, match=r"target.patch_size_t = 2 .* found 13; nearest are 45 and 53"):
        check_buckets([bucket(49, 480, 720)], COGVIDEOX, target=target)
    check_buckets([bucket(45, 480, 720), bucket(53, 480, 720)], COGVIDEOX, target=target)


def test_the_token_rule_names_frames_and_the_length_of_a_caption() -> None:
    """17550 video tokens (13 x 30 x 45) and one caption, or 49950 and three, in mini-batches of 64."""
    target = TargetConfig(frame_multiple=16, token_multiple=64, segment_frames=48)
    for num_frames, length in ((49, 498), (145, 502)):
        check_buckets([bucket(num_frames, 480, 720)], COGVIDEOX, target=target, text_length=length)
    with pytest.raises(ConfigError) as error:
        check_buckets([bucket(145, 480, 720)], COGVIDEOX, target=target, text_length=498)
    assert "found 51444 (49950 of video, 3 x 498 of text); nearest" in str(error.value)
    assert str(error.value).endswith("or text_encoder.max_length = 438 or 502")


def test_a_caption_length_is_offered_only_where_it_suits_every_bucket() -> None:
    target = TargetConfig(token_multiple=64)
    with pytest.raises(ConfigError) as error:
        check_buckets([bucket(1, 16, 16), bucket(1, 16, 32)], COGVIDEOX, target=target, text_length=63)
    assert "buckets.1.num_frames = 1" in str(error.value)
    assert "no text_encoder.max_length would do" in str(error.value)


def test_rules_that_exclude_each_other_say_so() -> None:
    """16n + 1 frames are an odd number of latent frames."""
    with pytest.raises(ConfigError, match=r"no num_frames up to .* meets all rules together"):
        check_buckets(
            [bucket(49, 480, 720)], COGVIDEOX, target=TargetConfig(frame_multiple=16, patch_size_t=2)
        )


@settings(deadline=None)
@given(
    st.integers(1, 120),
    TARGETS,
    st.sampled_from([COGVIDEOX, replace(COGVIDEOX, causal=False), replace(COGVIDEOX, segment_frames=9)]),
    st.sampled_from([32, 226]),
)
def test_the_lengths_of_whole_clips_are_those_that_the_rules_allow(
    num_frames: int, target: TargetConfig, geometry: Geometry, text_length: int
) -> None:
    own = [bucket(num_frames, 64, 64), bucket(17, 64, 64)]
    rules: dict[str, Any] = {"target": target, "text_length": text_length}
    assert clip_lengths(own, geometry, frames=FramesConfig(), **rules) == ((num_frames,), (17,))
    whole = FramesConfig(policy="fps", clips="whole")
    lengths = clip_lengths(own, geometry, frames=whole, **rules)[0]
    assert lengths[-1] == num_frames
    assert list(lengths) == sorted(set(lengths))
    for length in range(2, num_frames):
        more, segments = length - 1, 1
        fits = geometry.takes(length) and more % target.frame_multiple == 0
        if target.segment_frames and more >= target.segment_frames:
            segments = more // target.segment_frames
            fits = fits and more % target.segment_frames == 0
        if fits:
            patches, rest = divmod(geometry.latent_frames(length), target.patch_size_t)
            fits = not rest and (patches * 16 + segments * text_length) % target.token_multiple == 0
        assert (length in lengths) == fits
    event(f"several lengths: {len(lengths) > 1}")


def test_segments_name_the_nearest_counts() -> None:
    pieces = replace(COGVIDEOX, segment_frames=49)
    check_buckets([bucket(98, 480, 720)], pieces)
    with pytest.raises(ConfigError, match="takes a multiple of 49 frames; nearest are 98 and 147"):
        check_buckets([bucket(121, 480, 720)], pieces)
    with pytest.raises(ConfigError, match=r"nearest is 49$"):
        check_buckets([bucket(48, 480, 720)], pieces)


def test_all_problems_are_in_one_error() -> None:
    buckets = [bucket(48, 480, 720), bucket(49, 480, 721), bucket(49, 480, 720)]
    with pytest.raises(ConfigError) as error:
        check_buckets(buckets, COGVIDEOX, target=TargetConfig(patch_size_t=2))
    for place in ("buckets.0.num_frames", "buckets.1.width", "buckets.1.num_frames", "buckets.2.num_frames"):
        assert place in str(error.value)


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


def test_whole_clips_prefer_the_fewest_frames_that_hold_all_of_them() -> None:
    buckets = [bucket(25, 960, 1440), bucket(49, 480, 720), bucket(81, 240, 360)]
    for pictures, best in ((3, 0), (25, 0), (26, 1), (60, 2), (500, 2)):
        assert choose_bucket(buckets, width=720, height=480, num_pictures=pictures, whole=True) == best


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


def test_other_frame_rules_are_named_with_their_nearest_counts() -> None:
    plain = Geometry(temporal=4, spatial=8, channels=4, causal=False)
    with pytest.raises(ConfigError, match=r"takes 4n frames; nearest are 8 and 12"):
        check_buckets([bucket(9, 32, 32)], plain)
    pieces = Geometry(temporal=4, spatial=8, channels=4, segment_frames=17)
    with pytest.raises(ConfigError, match=r"takes a multiple of 17 frames; nearest are 34 and 51"):
        check_buckets([bucket(49, 32, 32)], pieces)
    assert plain.latent_frames(12) == 3
    assert pieces.latent_frames(51) == 3 * 5
    with pytest.raises(ValueError, match=r"segment_frames = 16: expected 4n \+ 1 frames"):
        Geometry(temporal=4, spatial=8, channels=4, segment_frames=16)


def test_windows_must_cover_a_clip_exactly() -> None:
    """Allegro leaves zeros where none of its windows of 24 x 320 x 320 reaches."""
    allegro = Geometry(4, 8, 4, causal=False, windows=((24, 16), (320, 200), (320, 240)))
    check_buckets([bucket(88, 720, 1280)], allegro)
    assert allegro.latent_shape(bucket(88, 720, 1280)) == (22, 4, 90, 160)
    with pytest.raises(ConfigError) as error:
        check_buckets([bucket(90, 480, 1280), bucket(8, 720, 320)], allegro)
    assert "takes 16n + 24 frames; nearest are 88 and 104" in str(error.value)
    expected = "height = 480: expected a multiple of 16 pixels that is 200n + 320; nearest 320 and 720"
    assert expected in str(error.value)
    assert "buckets.1.num_frames = 8: the video encoder takes 16n + 24 frames; nearest is 24" in str(
        error.value
    )


def test_windows_of_which_no_size_is_whole_patches() -> None:
    odd = Geometry(4, 8, 4, causal=False, windows=((24, 16), (136, 16), (136, 56)))
    with pytest.raises(ConfigError) as error:
        check_buckets([bucket(24, 136, 192)], odd)
    expected = (
        "height = 136: expected a multiple of 16 pixels that is 16n + 136; there is none, target.patch_size"
    )
    assert f"{expected} = 2 is too much" in str(error.value)
    check_buckets([bucket(24, 136, 192)], odd, target=TargetConfig(patch_size=1))


def test_a_patch_of_one_takes_sides_that_a_patch_of_two_does_not() -> None:
    ltx = Geometry(temporal=8, spatial=32, channels=128)
    with pytest.raises(ConfigError, match="height = 480: expected a multiple of 64 pixels"):
        check_buckets([bucket(97, 480, 704)], ltx)
    check_buckets([bucket(97, 480, 704)], ltx, target=TargetConfig(patch_size=1))


def test_a_clip_longer_than_its_scaling_is_refused() -> None:
    cosmos = Geometry(temporal=8, spatial=8, channels=16)
    check_buckets([bucket(121, 32, 32)], cosmos, most_latent_frames=16)
    with pytest.raises(ConfigError, match="129: 17 latent frames, and the model's scaling knows 16"):
        check_buckets([bucket(129, 32, 32)], cosmos, most_latent_frames=16)
