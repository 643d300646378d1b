"""One decoded picture -> one RGB frame of its bucket: shape, rotation, colour, alpha.

In: a picture in any pixel format, size and orientation. Out: uint8 [H, W, 3] in full-range RGB. A crop
only moves pointers; one swscale call then resizes and converts straight to planar RGB, which is both
faster and closer to the exact arithmetic (half a level) than packed RGB; rotation happens for free while
the small planes are interleaved. HDR transfer curves are kept as they are and noted, interlaced
pictures stay woven and are noted.

H, W pixels of the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter

from pipeline.geometry import Orientation, fit, orientation_of
from schemas.config import BucketConfig, ResizeConfig
from schemas.errors import ClipError

_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND
_MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020"}
"""FFmpeg's AVColorSpace numbers that swscale converts."""
_SWS = {
    "bt709": Colorspace.ITU709,
    "fcc": Colorspace.FCC,
    "bt601": Colorspace.ITU601,
    "smpte240m": Colorspace.SMPTE240M,
    "bt2020": Colorspace.BT2020,
}
_UNTAGGED_HD_HEIGHT = 720
"""Untagged pictures of at least this coded height are taken as BT.709, lower as BT.601 (as players do)."""
_TRANSFERS = {int(curve): curve.name.lower() for curve in ColorTrc}
_WIDENED = np.clip(np.round((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)
"""Limited to full range: swscale takes every gray picture as full."""
_HDR = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}


@dataclass(frozen=True)
class Color:
    """How a picture's numbers are meant."""

    matrix: str
    range: str
    rule: str
    """"tagged", "rgb", "gray", or what stood in for a missing tag: "untagged:bt709"."""
    transfer: str


def color_of(frame: VideoFrame) -> Color:
    """Matrix and range of a picture, by its tags, else by the rule players use."""
    transfer = _TRANSFERS.get(frame.color_trc, "unspecified")
    if frame.format.is_rgb or frame.format.has_palette:
        return Color("rgb", "full", "rgb", transfer)
    if len(frame.format.components) == 1:
        gray_range = "limited" if frame.color_range == ColorRange.MPEG else "full"
        return Color("gray", gray_range, "gray", transfer)
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    matrix, rule = _MATRICES.get(frame.colorspace), "tagged"
    if matrix is None:
        matrix = "bt709" if frame.height >= _UNTAGGED_HD_HEIGHT else "bt601"
        rule = f"untagged:{matrix}"
    return Color(matrix, "full" if full else "limited", rule, transfer)


class Normalizer:
    """Turns the pictures of one clip into frames of one bucket; reuses its scaler and its crops."""

    def __init__(self, bucket: BucketConfig, *, resize: ResizeConfig, sar: Fraction) -> None:
        self._bucket, self._mode, self._sar = bucket, resize.mode, sar
        self._scaler, self._flattener = VideoReformatter(), VideoReformatter()
        self._crops: dict[tuple[object, ...], Graph] = {}
        self._notes: dict[str, None] = {}
        self._sizes: dict[str, None] = {}
        self.interlaced = False

    @property
    def notes(self) -> list[str]:
        """What is odd about the pictures seen so far, a sentence each."""
        sizes = list(self._sizes)
        changes = [f"the picture size changes: {', '.join(sizes)}"] if len(sizes) > 1 else []
        return [*self._notes, *changes]

    def convert(self, frame: VideoFrame, out: np.ndarray) -> None:
        """Write `frame` into `out`, uint8 [H, W, 3] of the bucket's size."""
        color, orientation = color_of(frame), orientation_of(frame)
        self._observe(frame, orientation)
        into = (self._bucket.width, self._bucket.height)
        if orientation.transpose:
            into = into[::-1]
        place = fit(frame.width, frame.height, sar=self._sar, into=into, mode=self._mode)
        pixel_format = frame.format
        try:
            frame = self._cropped(frame, place.crop)
            if pixel_format.has_palette or any(component.is_alpha for component in pixel_format.components):
                frame = self._over_black(frame, color)
                color = Color("rgb", "full", "rgb", color.transfer)
            frame = _to_rgb(self._scaler, frame, color, width=place.size[0], height=place.size[1])
        except MemoryError:
            raise
        except av.FFmpegError as error:
            message = (
                f"pictures in pixel format {pixel_format.name} cannot be turned into RGB: {error.strerror}"
            )
            raise ClipError("no_decoder", message) from error
        if place.size != into:
            out[:] = 0
        # Planes come as green, blue, red; each is turned as a view while it is interleaved.
        for channel, i in enumerate((2, 0, 1)):
            shown = orientation.apply(_plane(frame, i))
            if color.matrix == "gray" and color.range == "limited":
                shown = _WIDENED[shown]
            top, left = (out.shape[0] - shown.shape[0]) // 2, (out.shape[1] - shown.shape[1]) // 2
            out[top : top + shown.shape[0], left : left + shown.shape[1], channel] = shown

    def _observe(self, frame: VideoFrame, orientation: Orientation) -> None:
        self._sizes[f"{frame.width}x{frame.height}"] = None
        self.interlaced |= frame.interlaced_frame
        if orientation.mirrored:
            self._notes["mirrored as its display matrix asks"] = None
        if frame.interlaced_frame:
            self._notes["interlaced: both fields are woven into one picture"] = None
        if frame.color_trc in _HDR:
            self._notes[f"HDR, {_HDR[frame.color_trc]}: transfer curve kept, not tone-mapped"] = None

    def _cropped(self, frame: VideoFrame, crop: tuple[int, int, int, int]) -> VideoFrame:
        """A view of part of `frame`: FFmpeg's crop filter moves pointers and copies nothing."""
        x, y, width, height = crop
        if (width, height) == (frame.width, frame.height):
            return frame
        key = (frame.width, frame.height, frame.format.name, crop)
        if key not in self._crops:
            graph = Graph()
            graph.threads = 1
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
            )
            cut = graph.add("crop", f"{width}:{height}:{x}:{y}")
            sink = graph.add("buffersink")
            graph.link_nodes(source, cut, sink).configure()
            self._crops[key] = graph
        self._crops[key].push(frame)
        cropped = self._crops[key].pull()
        assert isinstance(cropped, VideoFrame)
        return cropped

    def _over_black(self, frame: VideoFrame, color: Color) -> VideoFrame:
        """`frame` composited over black at its own size, as planar RGB: scaling first would mix in the
        colours hidden under transparent pixels."""
        rgba = _to_rgb(self._flattener, frame, color, width=frame.width, height=frame.height, alpha=True)
        flat = VideoFrame(frame.width, frame.height, "gbrp")
        alpha = _plane(rgba, 3).astype(np.uint16)
        if alpha.min() < 255:
            self._notes["alpha: composited over black"] = None
        for i in range(3):
            _plane(flat, i)[:] = (_plane(rgba, i) * alpha + 127) // 255
        return flat


def _to_rgb(
    scaler: VideoReformatter, frame: VideoFrame, color: Color, *, width: int, height: int, alpha: bool = False
) -> VideoFrame:
    matrix = _SWS.get(color.matrix, Colorspace.DEFAULT)
    return scaler.reformat(
        frame,
        width=width,
        height=height,
        format="gbrap" if alpha else "gbrp",
        src_colorspace=matrix,
        dst_colorspace=matrix,
        src_color_range=ColorRange.JPEG if color.range == "full" else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=_SCALING,
        threads=1,
    )


def _plane(frame: VideoFrame, i: int) -> np.ndarray:
    """Plane `i` of an 8-bit planar picture, [rows, columns], as a writable view."""
    plane = frame.planes[i]
    return np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
