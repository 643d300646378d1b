"""Videos drawn for tests: every picture carries its number in its pixels, so decoding has exact answers."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

_OPTIONS = {
    "libx264": {"preset": "veryfast", "crf": "12", "x264-params": "scenecut=0"},
    "libx265": {"preset": "ultrafast", "crf": "12", "x265-params": "log-level=none:pools=1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "b:v": "2M"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "10", "b:v": "0"},
    "libsvtav1": {"preset": "12", "crf": "20", "svtav1-params": "lp=1"},
    "mpeg4": {"q:v": "2"},
    "mpeg2video": {"q:v": "2"},
    "mjpeg": {"q:v": "2"},
}
_PIXELS = {"mjpeg": "yuvj420p", "gif": "rgb8", "prores_ks": "yuv422p10le", "png": "rgb24"}


def draw(number: int, *, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: the eight bits of `number` as white or black blocks, four by two."""
    bits = np.array([number >> i & 1 for i in range(8)], np.uint8).reshape(2, 4)
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 4 // width
    return np.repeat((32 + 192 * bits)[rows][:, columns][..., None], 3, axis=2)


def read_number(picture: np.ndarray) -> int:
    """The number drawn into an RGB picture of any size."""
    height, width, _ = picture.shape
    number = 0
    for i in range(8):
        row, column = divmod(i, 4)
        y, x = (2 * row + 1) * height // 4, (2 * column + 1) * width // 8
        block = picture[y - height // 16 : y + height // 16 + 1, x - width // 32 : x + width // 32 + 1]
        number |= int(block.mean() > 128) << i
    return number


def make_video(
    path: Path,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = (96, 64),
    fps: int = 24,
    num_frames: int = 24,
    gop: int = 12,
    bframes: int = 0,
    pts: Sequence[int] | None = None,
    rotation: float = 0,
    sar: Fraction | None = None,
    pix_fmt: str | None = None,
    pictures: Sequence[np.ndarray | VideoFrame] | None = None,
    options: dict[str, str] | None = None,
    container_format: str | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write a video of `num_frames` numbered pictures, or of `pictures` (RGB arrays or ready frames).

    `size` is (width, height); `pts` are presentation times in units of 1 / fps / 100 seconds; `rotation`
    turns the picture counter-clockwise by a display matrix; `path`'s suffix picks the container.
    """
    width, height = size
    if pictures is None:
        pictures = [draw(i, width=width, height=height) for i in range(num_frames)]
    with av.open(str(path), "w", format=container_format, options=container_options) as container:
        stream = container.add_stream(codec, rate=fps, options=_OPTIONS.get(codec, {}) | (options or {}))
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = width, height
        stream.pix_fmt = pix_fmt or _PIXELS.get(codec, "yuv420p")
        context = stream.codec_context
        context.thread_count = 1
        if pts is not None:
            context.time_base = Fraction(1, 100 * fps)
        context.gop_size, context.max_b_frames = gop, bframes
        if sar is not None:
            context.sample_aspect_ratio = sar
        if rotation:
            stream.set_display_rotation(rotation)
        for i, picture in enumerate(pictures):
            frame = picture if isinstance(picture, VideoFrame) else VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts = i if pts is None else pts[i]
            frame.time_base = Fraction(1, fps) if pts is None else Fraction(1, 100 * fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
