"""Pictures to frames: colours against exact arithmetic, crops and bars against known pictures."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.normalize import Normalizer
from pipeline.tonemap import SDR_WHITE, pq_code, tone_curve
from schemas.config import BucketConfig, PictureConfig, ResizeConfig
from schemas.errors import ClipError
from tests.videos import make_video

WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
PICTURE = PictureConfig()
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
    frame: VideoFrame,
    *,
    height: int,
    width: int,
    mode: str = "cover_crop",
    sar: Fraction = Fraction(1),
    picture: PictureConfig = PICTURE,
) -> tuple[np.ndarray, Normalizer]:
    resize = ResizeConfig.model_validate({"mode": mode})
    bucket = BucketConfig(num_frames=1, height=height, width=width)
    normalizer = Normalizer(bucket, resize=resize, picture=picture, sar=sar)
    out = np.full((height, width, 3), 77, np.uint8)
    normalizer.convert(frame, out)
    return out, normalizer


def errors(found: np.ndarray, expected: np.ndarray) -> tuple[float, float, float]:
    """Largest mean error of a channel, mean absolute error, largest error."""
    error = found - expected
    return float(np.abs(error.mean((0, 1))).max()), float(np.abs(error).mean()), float(np.abs(error).max())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize(
    "pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le"]
)
def test_colours_are_those_of_exact_arithmetic(pixel_format: str, matrix: str, full: bool) -> None:
    frame = yuv(pixel_format, tag=matrix, full=full)
    found, _ = convert(frame, height=64, width=96)
    bias, mean, largest = errors(found, exact_rgb(frame, matrix=matrix, full=full))
    fast = pixel_format in ("yuv420p", "yuv422p")
    assert bias < (1.1 if fast else 0.1)
    assert mean < (1 if fast else 0.3)
    assert largest < (4 if fast else 2)
    # The other matrix and the other range are clearly something else.
    other = "bt709" if matrix == "bt601" else "bt601"
    assert errors(found, exact_rgb(frame, matrix=other, full=full))[2] > 8
    assert errors(found, exact_rgb(frame, matrix=matrix, full=not full))[2] > 8


def test_odd_sizes_are_as_exact() -> None:
    frame = yuv("yuv420p", width=95, height=63)
    found, _ = convert(frame, height=63, width=95)
    bias, mean, _ = errors(found, exact_rgb(frame, matrix="bt709", full=False))
    assert bias < 0.5
    assert mean < 0.5


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv420p10le"])
def test_a_drawn_clip_comes_back_through_a_codec(
    tmp_path: Path, pixel_format: str, matrix: str, full: bool
) -> None:
    source = yuv(pixel_format, width=384, height=256, tag=matrix, full=full)
    options = {
        "colorspace": {"bt601": "smpte170m", "bt709": "bt709"}[matrix],
        "color_range": "pc" if full else "tv",
        "crf": "4",
    }
    path = make_video(
        tmp_path / "clip.mp4", size=(384, 256), pix_fmt=pixel_format, pictures=[source] * 2, options=options
    )
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    for height, width in ((256, 384), (192, 288), (96, 144)):
        found, _ = convert(frame, height=height, width=width)
        expected = exact_rgb(source, matrix=matrix, full=full)
        y, x = ((np.arange(n) + 0.5) * 256 / height for n in (height, width))
        bias, mean, _ = errors(found, expected[y.astype(int)][:, x.astype(int)])
        assert bias < 1.2
        assert mean < 1.2


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "gray"])
def test_black_and_white_are_exact_and_neutrals_have_no_tint(pixel_format: str, full: bool) -> None:
    frame = VideoFrame(256, 32, pixel_format)
    frame.color_range = ColorRange.JPEG if full else ColorRange.MPEG
    scale = 2 ** (frame.format.components[0].bits - 8)
    plane(frame, 0)[:] = np.arange(256) * scale
    for i in range(1, len(frame.planes)):
        plane(frame, i)[:] = 128 * scale
    found, _ = convert(frame, height=32, width=256)
    assert (np.ptp(found, axis=2) == 0).all()
    black, white = (0, 255) if full else (16, 235)
    assert (found[:, : black + 1] == 0).all()
    assert (found[:, white:] == 255).all()
    levels = (np.arange(256) - black) * 255 / (white - black)
    assert np.abs(found[0, black:white, 0] - levels[black:white]).max() <= 1.01


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("width", [120, 300])
def test_colours_survive_scaling_and_cropping(width: int, full: bool) -> None:
    frame = yuv("yuv420p", width=480, height=240, full=full)
    height = width * 2 // 3
    found, _ = convert(frame, height=height, width=width)
    reference = exact_rgb(frame, matrix="bt709", full=full)[:, 60:420]
    y, x = ((np.arange(n) + 0.5) * 240 / height for n in (height, width))
    here = reference[y.astype(int)][:, x.astype(int)]
    reference = (here + reference[(y - 0.5).astype(int)][:, (x - 0.5).astype(int)]) / 2
    bias, mean, largest = errors(found, reference)
    assert bias < 1.1
    assert mean < 1
    assert largest < 4


@settings(max_examples=60)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from(["yuv420p", "yuv422p", "yuvj420p", "yuv444p", "yuv420p10le", "nv12", "yuv411p"]),
    st.sampled_from(["cover_crop", "pad", "stretch"]),
    st.fractions(Fraction(1, 3), 3, max_denominator=9),
)
def test_every_pixel_of_any_size_and_shape_is_written(
    width: int, height: int, pixel_format: str, mode: str, sar: Fraction
) -> None:
    gray = VideoFrame.from_ndarray(np.full((height, width), 160, np.uint8), "gray")
    frame = gray.reformat(format=pixel_format, dst_color_range=ColorRange.MPEG)
    for plane, component in zip(frame.planes, frame.format.components, strict=False):
        # Now and then swscale leaves a pixel of an odd row as it found the memory.
        samples = np.frombuffer(memoryview(plane), np.uint8 if component.bits <= 8 else np.uint16)
        samples[:] = samples[0]
    found, _ = convert(frame, height=32, width=48, mode=mode, sar=sar)
    # swscale rounds its weights: chroma of a flat picture may be one level off, RGB two.
    painted = np.abs(found.astype(int) - int(found[16, 24, 0])) <= 3
    assert found[16, 24, 0] in range(156, 190)
    assert (painted | (found == 0)).all()
    if mode != "pad":
        assert painted.all()


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p"])
@pytest.mark.parametrize("mode", ["cover_crop", "pad"])
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_turned_clips_are_upright(tmp_path: Path, degrees: int, mode: str, pixel_format: str) -> None:
    shown = {}
    for angle in (0, degrees):
        path = make_video(tmp_path / f"{angle}.mp4", rotation=angle, pix_fmt=pixel_format, num_frames=1)
        turned = angle % 180 == 90
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
        width, height = (40, 80) if turned else (80, 40)
        shown[angle], _ = convert(frame, width=width, height=height, mode=mode)
    assert np.array_equal(shown[degrees], np.rot90(shown[0], degrees // 90))


@pytest.mark.parametrize("pixel_format", ["rgb24", "gbrp", "bgra", "rgb0"])
def test_rgb_formats_pass_through(pixel_format: str) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    frame = VideoFrame.from_ndarray(picture, "rgb24").reformat(format=pixel_format)
    found, normalizer = convert(frame, height=64, width=96)
    assert np.abs(found.astype(int) - picture).max() <= 1
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


@given(
    st.tuples(*[st.integers(0, 255)] * 3), st.tuples(*[st.integers(0, 255)] * 3), st.sampled_from([24, 64])
)
def test_hidden_colours_never_show_and_the_background_is_exact(
    background: tuple[int, int, int], hidden: tuple[int, int, int], height: int
) -> None:
    rgba = np.zeros((64, 96, 4), np.uint8)
    rgba[..., :3] = hidden
    rgba[:, :32] = (9, 130, 250, 255)
    frame = VideoFrame.from_ndarray(rgba, "rgba")
    picture = PictureConfig(background=background)
    found, normalizer = convert(frame, height=height, width=height * 3 // 2, picture=picture)
    edge = height // 2
    # Beside the ringing of the edge, the background and the opaque part are as they are.
    assert (found[:, edge + 4 :] == background).all()
    assert np.abs(found[:, : edge - 4].astype(int) - (9, 130, 250)).max() <= 1
    assert normalizer.notes == [f"alpha: composited over RGB {background}"]


def test_half_transparent_is_half_of_each() -> None:
    alpha = np.arange(256, dtype=np.uint8)
    rgba = np.full((32, 256, 4), 255, np.uint8)
    rgba[..., 3] = alpha
    frame = VideoFrame.from_ndarray(rgba, "rgba")
    found, _ = convert(frame, height=32, width=256, picture=PictureConfig(background=(100, 0, 255)))
    for channel, level in enumerate((100, 0, 255)):
        expected = (255 * alpha.astype(float) + level * (255.0 - alpha)) / 255
        assert np.abs(found[..., channel] - expected).max() <= 0.51


def test_opaque_pictures_with_alpha_need_no_note() -> None:
    frame = VideoFrame.from_ndarray(np.full((64, 96, 4), 255, np.uint8), "rgba")
    found, normalizer = convert(frame, height=64, width=96, picture=PictureConfig(background=(255, 0, 0)))
    assert (found == 255).all()
    assert normalizer.notes == []


def pq_picture(light: float) -> VideoFrame:
    """A neutral PQ picture of `light` cd/m2, in limited range."""
    frame = VideoFrame(96, 64, "yuv420p10le")
    frame.colorspace, frame.color_trc, frame.color_range = 9, ColorTrc.SMPTE2084, ColorRange.MPEG
    plane(frame, 0)[:] = round(64 + 876 * float(pq_code(np.array(light))))
    plane(frame, 1)[:], plane(frame, 2)[:] = 512, 512
    return frame


@pytest.mark.parametrize("light", [0.0, 1.0, 20.0, 203.0, 1000.0])
def test_hdr_is_mapped_kept_or_refused(light: float) -> None:
    shown = float(tone_curve(np.array(light), peak=1000)) / SDR_WHITE
    found, normalizer = convert(pq_picture(light), height=32, width=32)
    assert np.abs(found - 255 * shown ** (1 / 2.4)).max() <= 2
    assert normalizer.notes == ["HDR, PQ, taken to peak at 1000 cd/m2: tone-mapped to SDR BT.709 by BT.2390"]
    kept, normalizer = convert(pq_picture(light), height=32, width=32, picture=PictureConfig(hdr="keep"))
    assert np.abs(kept - 255 * float(pq_code(np.array(light)))).max() <= 1
    assert normalizer.notes == ["HDR, PQ: transfer curve kept, not tone-mapped"]
    with pytest.raises(ClipError) as caught:
        convert(pq_picture(light), height=32, width=32, picture=PictureConfig(hdr="quarantine"))
    assert caught.value.reason == "hdr"


def test_the_first_picture_sets_the_peak_of_the_clip(tmp_path: Path) -> None:
    pictures = []
    bright = np.full((64, 96, 3), 150, np.uint8)
    for peak in (4000, 400):
        options = {"color_trc": "smpte2084", "x265-params": f"log-level=none:pools=1:max-cll={peak},100"}
        path = make_video(
            tmp_path / "hdr.mp4", codec="libx265", pix_fmt="yuv420p10le", pictures=[bright], options=options
        )
        with av.open(str(path)) as container:
            pictures.append(next(container.decode(video=0)))
    bucket = BucketConfig(num_frames=1, height=64, width=96)
    normalizer = Normalizer(bucket, resize=ResizeConfig(), picture=PICTURE, sar=Fraction(1))
    out = np.empty((2, 64, 96, 3), np.uint8)
    for picture, frame in zip(pictures, out, strict=True):
        normalizer.convert(picture, frame)
    assert np.abs(out[0].astype(int) - out[1]).max() <= 2
    assert np.abs(convert(pictures[1], height=64, width=96)[0].astype(int) - out[0]).max() > 20
    assert len(normalizer.notes) == 1
    assert "4000" in normalizer.notes[0]


def test_wide_primaries_are_converted_whatever_the_format() -> None:
    picture = np.full((64, 96, 3), (160, 100, 100), np.uint8)
    picture[:, 48:] = 100
    frame = VideoFrame.from_ndarray(picture, "rgb24")
    frame.color_primaries = ColorPrimaries.BT2020
    found, normalizer = convert(frame, height=64, width=96)
    assert np.abs(found[:, 50:].astype(int) - 100).max() <= 1
    assert (found[:, :46, 0] > 165).all()
    assert (found[:, :46, 1] < 100).all()
    assert normalizer.notes == ["BT.2020 primaries: converted to BT.709"]


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
    bucket = BucketConfig(num_frames=1, height=32, width=48)
    normalizer = Normalizer(bucket, resize=ResizeConfig(), picture=PICTURE, sar=Fraction(1))
    out = np.empty((32, 48, 3), np.uint8)
    for width, height in ((96, 64), (192, 64), (97, 65)):
        picture = np.full((height, width, 3), 90, np.uint8)
        normalizer.convert(VideoFrame.from_ndarray(picture, "rgb24"), out)
        assert np.abs(out.astype(int) - 90).max() <= 1
    assert normalizer.notes == ["the picture size changes: 96x64, 192x64, 97x65"]


def test_a_change_of_format_or_colour_is_noted_and_each_picture_converted_by_its_own() -> None:
    normalizer = Normalizer(
        BucketConfig(num_frames=1, height=64, width=96),
        resize=ResizeConfig(),
        picture=PICTURE,
        sar=Fraction(1),
    )
    out = np.empty((64, 96, 3), np.uint8)
    for pixel_format, tag, matrix in (
        ("yuv420p", "bt709", "bt709"),
        ("yuv444p", "bt709", "bt709"),
        ("yuv444p", "", "bt601"),
    ):
        frame = yuv(pixel_format, tag=tag)
        normalizer.convert(frame, out)
        assert errors(out, exact_rgb(frame, matrix=matrix, full=False))[1] < 1
    assert normalizer.notes == [
        "the pixel format changes: yuv420p, yuv444p",
        "the colour changes: bt709 limited (tagged), bt601 limited (untagged:bt601)",
    ]
