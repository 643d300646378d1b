"""Pictures to frames: colours against exact arithmetic, crops and bars against known pictures."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange

from pipeline.normalize import Normalizer, color_of
from schemas.config import BucketConfig, ResizeConfig
from schemas.errors import ClipError

WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
TAGS = {"bt601": 6, "bt709": 1, "bt2020": 9, "": 2}


def plane(frame: VideoFrame, i: int) -> np.ndarray:
    """A writable view of plane `i`, in whole samples."""
    kind = np.uint8 if frame.format.components[i].bits == 8 else np.uint16
    samples = np.frombuffer(memoryview(frame.planes[i]), kind)
    return samples.reshape(frame.planes[i].height, -1)[:, : frame.planes[i].width]


def yuv(
    pixel_format: str, *, width: int = 96, height: int = 64, tag: str = "bt709", full: bool = False
) -> VideoFrame:
    """Smooth luma and chroma waves over the whole legal range."""
    frame = VideoFrame(width, height, pixel_format)
    frame.colorspace, frame.color_range = TAGS[tag], ColorRange.JPEG if full else ColorRange.MPEG
    for i in range(3):
        view = plane(frame, i)
        low, high = (0, 255) if full else (16, 235 if i == 0 else 240)
        y, x = np.mgrid[0 : view.shape[0], 0 : view.shape[1]] / max(view.shape)
        wave = 0.5 + 0.5 * np.sin(1.5 * x + i) * np.cos(2 * y + 2 * i)
        view[:] = np.round((low + (high - low) * wave) * 2 ** (frame.format.components[i].bits - 8))
    return frame


def exact_rgb(frame: VideoFrame, *, matrix: str, full: bool) -> np.ndarray:
    """The definition, in float: chroma bilinear at the centre of its samples, then the matrix."""
    scale = 2 ** (frame.format.components[0].bits - 8)
    luma, blue, red = (plane(frame, i).astype(float) / scale for i in range(3))
    blue, red = enlarged(blue, luma.shape), enlarged(red, luma.shape)
    k_red, k_blue = WEIGHTS[matrix]
    if full:
        luma, blue, red = luma / 255, (blue - 128) / 255, (red - 128) / 255
    else:
        luma, blue, red = (luma - 16) / 219, (blue - 128) / 224, (red - 128) / 224
    r = luma + 2 * (1 - k_red) * red
    b = luma + 2 * (1 - k_blue) * blue
    g = (luma - k_red * r - k_blue * b) / (1 - k_red - k_blue)
    rgb: np.ndarray = np.clip(np.stack([r, g, b], -1), 0, 1) * 255
    return rgb


def enlarged(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    for axis in (0, 1):
        n, old = shape[axis], values.shape[axis]
        at = np.clip((np.arange(n) + 0.5) * old / n - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        part = np.expand_dims(at - low, 1 - axis)
        after = np.take(values, np.minimum(low + 1, old - 1), axis)
        values = np.take(values, low, axis) * (1 - part) + after * part
    return values


def convert(
    frame: VideoFrame, *, height: int, width: int, mode: str = "cover_crop", sar: Fraction = Fraction(1)
) -> tuple[np.ndarray, Normalizer]:
    resize = ResizeConfig.model_validate({"mode": mode})
    normalizer = Normalizer(BucketConfig(num_frames=1, height=height, width=width), resize=resize, sar=sar)
    out = np.full((height, width, 3), 77, np.uint8)
    normalizer.convert(frame, out)
    return out, normalizer


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv444p10le"])
def test_colours_are_exact_to_two_levels(pixel_format: str, matrix: str, full: bool) -> None:
    frame = yuv(pixel_format, tag=matrix, full=full)
    found, _ = convert(frame, height=64, width=96)
    assert np.abs(found - exact_rgb(frame, matrix=matrix, full=full)).max() < 2
    # The other matrix and the other range are clearly something else.
    other = "bt709" if matrix == "bt601" else "bt601"
    assert np.abs(found - exact_rgb(frame, matrix=other, full=full)).max() > 8
    assert np.abs(found - exact_rgb(frame, matrix=matrix, full=not full)).max() > 8


def test_colours_survive_scaling_and_cropping() -> None:
    frame = yuv("yuv420p", width=480, height=240)
    found, _ = convert(frame, height=80, width=120)
    reference = exact_rgb(frame, matrix="bt709", full=False)[:, 60:420]
    reference = reference.reshape(80, 3, 120, 3, 3).mean((1, 3))
    assert np.abs(found - reference).max() < 3


def test_yuvj_is_full_range_without_a_tag() -> None:
    frame = yuv("yuvj420p", full=True)
    frame.color_range = ColorRange.UNSPECIFIED
    assert color_of(frame).range == "full"
    found, _ = convert(frame, height=64, width=96)
    assert np.abs(found - exact_rgb(frame, matrix="bt709", full=True)).max() < 2


@pytest.mark.parametrize(
    ("height", "matrix"), [(480, "bt601"), (719, "bt601"), (720, "bt709"), (1080, "bt709")]
)
def test_untagged_pictures_follow_the_players_rule(height: int, matrix: str) -> None:
    frame = yuv("yuv420p", width=32, height=height, tag="")
    color = color_of(frame)
    assert (color.matrix, color.rule) == (matrix, f"untagged:{matrix}")
    found, _ = convert(frame, height=height, width=32)
    assert np.abs(found - exact_rgb(frame, matrix=matrix, full=False)).max() < 2


@pytest.mark.parametrize("pixel_format", ["rgb24", "gbrp", "bgra", "rgb0"])
def test_rgb_formats_pass_through(pixel_format: str) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    frame = VideoFrame.from_ndarray(picture, "rgb24").reformat(format=pixel_format)
    found, normalizer = convert(frame, height=64, width=96)
    assert np.abs(found.astype(int) - picture).max() <= 1
    assert color_of(frame).rule == "rgb"
    assert normalizer.notes == []


@pytest.mark.parametrize("width", [64, 96])
def test_a_format_that_cannot_be_converted_is_a_clip_error(width: int) -> None:
    with pytest.raises(ClipError, match="rgb4 cannot be turned into RGB") as caught:
        convert(VideoFrame(96, 64, "rgb4"), height=64, width=width)
    assert caught.value.reason == "no_decoder"


def test_gray_has_a_range_too() -> None:
    frame = VideoFrame(96, 64, "gray")
    frame.color_range = ColorRange.MPEG
    plane(frame, 0)[:] = 16 + np.arange(96) * 2
    found, _ = convert(frame, height=64, width=96)
    expected = np.arange(96) * 2 * 255 / 219
    assert np.abs(found - expected[None, :, None]).max() < 2
    frame.color_range = ColorRange.UNSPECIFIED
    found, _ = convert(frame, height=64, width=96)
    assert np.abs(found - (16 + np.arange(96) * 2)[None, :, None]).max() < 2


def test_alpha_is_composited_over_black_before_scaling() -> None:
    rgba = np.full((64, 96, 4), 255, np.uint8)  # white everywhere, opaque on the left only
    rgba[:, 48:, 3] = 0
    rgba[:32, :48, 3] = 128
    frame = VideoFrame.from_ndarray(rgba, "rgba")
    found, normalizer = convert(frame, height=64, width=96)
    assert np.abs(found[:32, :48].astype(int) - 128).max() <= 1
    assert (found[32:, :48] >= 254).all()
    assert (found[:, 48:] == 0).all()
    assert normalizer.notes == ["alpha: composited over black"]


def test_pad_centres_the_whole_picture_between_black_bars() -> None:
    frame = VideoFrame.from_ndarray(np.full((64, 64, 3), 200, np.uint8), "rgb24")
    found, _ = convert(frame, height=64, width=96, mode="pad")
    assert (found[:, :16] == 0).all()
    assert (found[:, 80:] == 0).all()
    assert (found[:, 16:80] == 200).all()


def test_cover_crop_cuts_the_centre_and_stretch_keeps_the_edges() -> None:
    picture = np.zeros((64, 192, 3), np.uint8)
    picture[:, :48, 0], picture[:, 48:144, 1], picture[:, 144:, 2] = 255, 255, 255
    frame = VideoFrame.from_ndarray(picture, "rgb24")
    cropped, _ = convert(frame, height=64, width=96)
    assert (cropped == (0, 255, 0)).all()
    stretched, _ = convert(frame, height=64, width=96, mode="stretch")
    assert np.abs(stretched[:, :22].astype(int) - (255, 0, 0)).max() <= 2
    assert np.abs(stretched[:, -22:].astype(int) - (0, 0, 255)).max() <= 2


def test_sample_aspect_ratio_is_applied() -> None:
    frame = VideoFrame.from_ndarray(np.full((64, 64, 3), 200, np.uint8), "rgb24")
    found, _ = convert(frame, height=64, width=128, mode="pad", sar=Fraction(2))
    assert (found == 200).all()


def test_a_size_change_is_noted_and_each_picture_scaled_by_its_own_size() -> None:
    normalizer = Normalizer(
        BucketConfig(num_frames=1, height=32, width=48), resize=ResizeConfig(), sar=Fraction(1)
    )
    out = np.empty((32, 48, 3), np.uint8)
    for width, height in ((96, 64), (192, 64), (97, 65)):
        picture = np.full((height, width, 3), 90, np.uint8)
        normalizer.convert(VideoFrame.from_ndarray(picture, "rgb24"), out)
        assert np.abs(out.astype(int) - 90).max() <= 1
    assert normalizer.notes == ["the picture size changes: 96x64, 192x64, 97x65"]
