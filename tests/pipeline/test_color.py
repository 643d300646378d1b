"""What pictures' numbers mean, by tag and by rule."""

from __future__ import annotations

import pytest
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc

from pipeline.color import Color, check_color, color_of
from schemas.config import PictureConfig
from schemas.errors import ClipError


def picture(pixel_format: str = "yuv420p", *, height: int = 64, **tags: int) -> VideoFrame:
    frame = VideoFrame(32, height, pixel_format)
    for name, value in tags.items():
        setattr(frame, name, value)
    return frame


@pytest.mark.parametrize(
    ("number", "matrix"),
    [(1, "bt709"), (4, "fcc"), (5, "bt601"), (6, "bt601"), (7, "smpte240m"), (9, "bt2020")],
)
def test_tags_are_followed(number: int, matrix: str) -> None:
    for height in (64, 1080):
        color = color_of(picture(height=height, colorspace=number, color_range=ColorRange.MPEG))
        assert color == Color(matrix, "limited", "tagged", "unspecified")
    assert color_of(picture(colorspace=number, color_range=ColorRange.JPEG)).range == "full"


@pytest.mark.parametrize(
    ("height", "matrix"), [(480, "bt601"), (719, "bt601"), (720, "bt709"), (1080, "bt709")]
)
def test_untagged_pictures_follow_the_players_rule(height: int, matrix: str) -> None:
    color = color_of(picture(height=height))
    assert (color.matrix, color.range, color.rule) == (matrix, "limited", f"untagged:{matrix}")
    assert color_of(picture("yuvj420p", height=height)).range == "full"


def test_rgb_and_gray_have_no_matrix() -> None:
    assert color_of(picture("rgb24")).rule == "rgb"
    assert color_of(picture("pal8")).matrix == "rgb"
    assert color_of(picture("gray")) == Color("gray", "full", "gray", "unspecified")
    assert color_of(picture("gray10le", color_range=ColorRange.MPEG)).range == "limited"


@pytest.mark.parametrize(
    ("curve", "name"), [(ColorTrc.SMPTE2084, "PQ"), (ColorTrc.ARIB_STD_B67, "HLG"), (ColorTrc.BT709, "")]
)
def test_hdr_is_told_by_the_transfer_curve_and_refused_on_request(curve: ColorTrc, name: str) -> None:
    color = color_of(picture("yuv420p10le", colorspace=9, color_trc=curve))
    assert color.hdr == name
    # Without a tag, HDR is of BT.2020 primaries, and all else is as it is.
    assert color.wide == bool(name)
    for hdr in ("tonemap", "keep"):
        check_color(color, PictureConfig.model_validate({"hdr": hdr}))
    quarantine = PictureConfig(hdr="quarantine")
    if name:
        with pytest.raises(ClipError, match=name) as caught:
            check_color(color, quarantine)
        assert caught.value.reason == "hdr"
    else:
        check_color(color, quarantine)


def test_wide_primaries_are_told_by_their_tag() -> None:
    assert color_of(picture(color_primaries=ColorPrimaries.BT2020)).wide
    assert not color_of(picture(colorspace=9)).wide
    in_709 = picture(color_primaries=ColorPrimaries.BT709, color_trc=ColorTrc.SMPTE2084)
    assert not color_of(in_709).wide


@pytest.mark.parametrize(("number", "name"), [(8, "YCgCo"), (14, "ICtCp")])
def test_a_matrix_that_cannot_be_converted_is_refused(number: int, name: str) -> None:
    with pytest.raises(ClipError, match=name) as caught:
        check_color(color_of(picture(colorspace=number)), PictureConfig())
    assert caught.value.reason == "no_decoder"
