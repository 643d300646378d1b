"""One decoded picture -> one RGB frame of its bucket: shape, rotation, colour, alpha, HDR.

In: a picture in any pixel format, size and orientation. Out: uint8 [H, W, 3] in full-range RGB. A crop
only moves pointers. Then one of two ways, chosen by rule (`_fast`), trades exactness for time:

- 8-bit 4:2:0 and 4:2:2 that shrink by less than 9 to 4, or grow: scaled as YUV, then swscale's fast
  conversion of the small picture, which repeats chroma and rounds down; for limited range, where that
  costs most, the rounding is made good. Within one level of the exact colours on average, 46-49 dB on
  photographs.
- All else: one exact step to planar RGB that interpolates chroma (a fifth of a level, 46-58 dB), averaging
  areas where the picture shrinks by 9 to 4 or more: faster there than the first way, and as close.

Turning comes last, on the small picture. HDR and BT.2020 primaries go through `ToneMap`, also last.

H, W pixels of the output.
"""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from pipeline.color import Color, check_color, color_of
from pipeline.geometry import Orientation, fit, orientation_of
from pipeline.tonemap import BITS, ToneMap, source_peak
from schemas.config import BucketConfig, PictureConfig, ResizeConfig
from schemas.errors import ClipError

_SWS = {
    "bt709": Colorspace.ITU709,
    "fcc": Colorspace.FCC,
    "bt601": Colorspace.ITU601,
    "smpte240m": Colorspace.SMPTE240M,
    "bt2020": Colorspace.BT2020,
}
_FAST_FORMATS = {"yuv420p", "yuv422p", "yuvj420p", "yuvj422p"}
"""Those that swscale turns into RGB by its vector code, at even sizes and without ACCURATE_RND."""
_WIDENED = np.clip(np.round((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)
"""Limited to full range: swscale takes every gray picture as full."""


class Normalizer:
    """Turns the pictures of one clip into frames of one bucket; reuses its scalers, crops and tables."""

    def __init__(
        self, bucket: BucketConfig, *, resize: ResizeConfig, picture: PictureConfig, sar: Fraction
    ) -> None:
        self._bucket, self._mode, self._picture, self._sar = bucket, resize.mode, picture, sar
        self._scaler, self._converter, self._flattener = (VideoReformatter() for _ in range(3))
        self._crops: dict[tuple[object, ...], Graph] = {}
        self._scratch = np.empty((0, 0, 3), np.uint8)
        self._orientations: dict[tuple[int, int], Orientation] = {}
        self._tone_maps: dict[tuple[str, bool], ToneMap] = {}
        self._notes: dict[str, None] = {}
        self._seen: dict[str, dict[str, None]] = {}
        self.interlaced = False
        """A picture came with its fields woven together."""

    @property
    def notes(self) -> list[str]:
        """What is odd about the pictures seen so far, a sentence each."""
        changes = [
            f"the {what} changes: {', '.join(values)}"
            for what, values in self._seen.items()
            if len(values) > 1
        ]
        return [*self._notes, *changes]

    def convert(self, frame: VideoFrame, out: np.ndarray) -> None:
        """Write `frame` into `out`, uint8 [H, W, 3] of the bucket's size. ClipError where its colours
        cannot or, by the settings, must not be brought to RGB."""
        color, orientation = color_of(frame), self._orientation(frame)
        check_color(color, self._picture)
        self._observe(frame, color, orientation)
        into = (self._bucket.width, self._bucket.height)
        if orientation.transpose:
            into = into[::-1]
        place = fit(frame.width, frame.height, sar=self._sar, into=into, mode=self._mode)
        if place.size != into:
            out[:] = 0
        width, height = place.size[::-1] if orientation.transpose else place.size
        top, left = (out.shape[0] - height) // 2, (out.shape[1] - width) // 2
        shown = out[top : top + height, left : left + width]
        pixel_format, tone_map = frame.format, self._tone_map(frame, color)
        try:
            frame = self._cropped(frame, place.crop)
            if pixel_format.has_palette or any(component.is_alpha for component in pixel_format.components):
                frame = self._over_background(frame, color)
                color = Color("rgb", "full", "rgb", color.transfer)
            if tone_map is not None:
                small = self._exact(frame, color, place.size, f"gbrp{BITS}le")
                codes = np.stack([_plane(small, i) for i in (2, 0, 1)])
                mapped = tone_map.apply(codes.reshape(3, -1)).reshape(codes.shape)
                _interleave(mapped, orientation, shown)
            elif _fast(frame, place.size):
                self._quick(frame, color, place.size, orientation, shown)
            else:
                small = self._exact(frame, color, place.size, "gbrp")
                planes = [_plane(small, i) for i in (2, 0, 1)]
                if color.matrix == "gray" and color.range == "limited":
                    planes = [_WIDENED[plane] for plane in planes]
                _interleave(planes, orientation, shown)
        except MemoryError:
            raise
        except av.FFmpegError as error:
            message = (
                f"pictures in pixel format {pixel_format.name} cannot be turned into RGB: {error.strerror}"
            )
            raise ClipError("no_decoder", message) from error

    def _orientation(self, frame: VideoFrame) -> Orientation:
        """That of the first picture of its size. Looking at side data ties a picture into a reference cycle,
        so that its memory waits for the collector: once a clip is fine, once a picture is not."""
        size = (frame.width, frame.height)
        if size not in self._orientations:
            self._orientations[size] = orientation_of(frame)
        return self._orientations[size]

    def _observe(self, frame: VideoFrame, color: Color, orientation: Orientation) -> None:
        for what, value in (
            ("picture size", f"{frame.width}x{frame.height}"),
            ("pixel format", frame.format.name),
            ("colour", f"{color.matrix} {color.range} ({color.rule})"),
        ):
            self._seen.setdefault(what, {})[value] = None
        if orientation.mirrored:
            self._notes["mirrored as its display matrix asks"] = None
        if frame.interlaced_frame:
            self.interlaced = True
            self._notes["interlaced: both fields are woven into one picture"] = None
        if color.hdr and self._picture.hdr == "keep":
            self._notes[f"HDR, {color.hdr}: transfer curve kept, not tone-mapped"] = None

    def _tone_map(self, frame: VideoFrame, color: Color) -> ToneMap | None:
        """What brings this picture to SDR BT.709. The first HDR picture sets the peak for the clip: one
        that changed from picture to picture would flicker."""
        if not (color.hdr or color.wide) or (color.hdr and self._picture.hdr == "keep"):
            return None
        key = (color.hdr, color.wide)
        if key not in self._tone_maps:
            peak = source_peak(frame)
            self._tone_maps[key] = ToneMap(color.hdr, peak=peak, wide=color.wide)
            if color.hdr:
                of_peak = f", taken to peak at {peak:.0f} cd/m2" if color.hdr == "PQ" else ""
                self._notes[f"HDR, {color.hdr}{of_peak}: tone-mapped to SDR BT.709 by BT.2390"] = None
            else:
                self._notes["BT.2020 primaries: converted to BT.709"] = None
        return self._tone_maps[key]

    def _quick(
        self,
        frame: VideoFrame,
        color: Color,
        size: tuple[int, int],
        orientation: Orientation,
        shown: np.ndarray,
    ) -> None:
        """Scale in YUV, convert the small picture by swscale's vector code."""
        if (frame.width, frame.height) != size:
            limits = ColorRange.JPEG if color.range == "full" else ColorRange.MPEG
            # Chroma keeps all its rows: as quick as 4:2:0, and 1.4 dB closer.
            frame = _reformat(self._scaler, frame, color, size, "yuv422p", limits)
        scaling = Interpolation.BICUBIC
        if orientation == Orientation():
            small = _reformat(self._converter, frame, color, size, "rgb24", ColorRange.JPEG, scaling)
            rgb = _plane(small, 0).reshape(shown.shape)
        else:
            small = _reformat(self._converter, frame, color, size, "gbrp", ColorRange.JPEG, scaling)
            _interleave([_plane(small, i) for i in (2, 0, 1)], orientation, shown)
            rgb = shown
        # On average one level lost in rounding down; black and white are exact. New memory for each step
        # would cost several times what the arithmetic does.
        if self._scratch.shape != shown.shape:
            self._scratch = np.empty_like(shown)
        np.subtract(rgb, 1, out=self._scratch)
        np.less(self._scratch, 254, out=self._scratch.view(np.bool_))
        np.add(rgb, self._scratch, out=shown)

    def _exact(self, frame: VideoFrame, color: Color, size: tuple[int, int], pixel_format: str) -> VideoFrame:
        """Scale and convert to planar RGB in one step."""
        scaling = Interpolation.AREA if _shrinks(frame, size) else Interpolation.BICUBIC
        scaling |= Interpolation.ACCURATE_RND
        return _reformat(self._scaler, frame, color, size, pixel_format, ColorRange.JPEG, scaling)

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
            cut = graph.add("crop", f"{width}:{height}:{x}:{y}:exact=1")
            sink = graph.add("buffersink")
            graph.link_nodes(source, cut, sink).configure()
            self._crops[key] = graph
        self._crops[key].push(frame)
        cropped = self._crops[key].pull()
        assert isinstance(cropped, VideoFrame)
        return cropped

    def _over_background(self, frame: VideoFrame, color: Color) -> VideoFrame:
        """`frame` composited over the background at its own size, as planar RGB: scaling first would mix
        in the colours hidden under transparent pixels."""
        size = (frame.width, frame.height)
        scaling = Interpolation.BICUBIC | Interpolation.ACCURATE_RND
        rgba = _reformat(self._flattener, frame, color, size, "gbrap", ColorRange.JPEG, scaling)
        flat = VideoFrame(*size, "gbrp")
        alpha = _plane(rgba, 3).astype(np.uint16)
        background = self._picture.background
        if alpha.min() < 255:
            self._notes[f"alpha: composited over RGB {background}"] = None
        for i, level in enumerate((background[1], background[2], background[0])):
            # Divided by 255 and rounded, in 16 bits.
            mixed = _plane(rgba, i) * alpha + level * (255 - alpha) + 128
            _plane(flat, i)[:] = (mixed + (mixed >> 8)) >> 8
        return flat


def _fast(frame: VideoFrame, size: tuple[int, int]) -> bool:
    """Whether the quick way is possible and worth it."""
    even = size[0] % 2 == 0 and size[1] % 2 == 0
    return frame.format.name in _FAST_FORMATS and even and not _shrinks(frame, size)


def _shrinks(frame: VideoFrame, size: tuple[int, int]) -> bool:
    """Whether the picture shrinks so far, 9 to 4 (1080 lines to 480) or more both ways, that averaging areas
    is both faster than bicubic and, by PSNR, as close to an antialiased one."""
    return 4 * frame.width >= 9 * size[0] and 4 * frame.height >= 9 * size[1]


def _reformat(
    scaler: VideoReformatter,
    frame: VideoFrame,
    color: Color,
    size: tuple[int, int],
    pixel_format: str,
    color_range: ColorRange,
    scaling: Interpolation = Interpolation.BICUBIC,
) -> VideoFrame:
    matrix = _SWS.get(color.matrix, Colorspace.DEFAULT)
    return scaler.reformat(
        frame,
        width=size[0],
        height=size[1],
        format=pixel_format,
        src_colorspace=matrix,
        dst_colorspace=matrix,
        src_color_range=ColorRange.JPEG if color.range == "full" else ColorRange.MPEG,
        dst_color_range=color_range,
        interpolation=scaling,
        threads=1,
    )


def _plane(frame: VideoFrame, i: int) -> np.ndarray:
    """Plane `i`, [rows, bytes or 16-bit samples], as a writable view."""
    plane, component = frame.planes[i], frame.format.components[i]
    samples = np.frombuffer(memoryview(plane), np.uint8 if component.bits <= 8 else np.uint16)
    width = plane.width * (3 if frame.format.name == "rgb24" else 1)
    return samples.reshape(plane.height, -1)[:, :width]


def _interleave(planes: np.ndarray | list[np.ndarray], orientation: Orientation, shown: np.ndarray) -> None:
    """Red, green and blue planes, turned as views, into [rows, columns, 3]."""
    for channel in range(3):
        shown[:, :, channel] = orientation.apply(planes[channel])
