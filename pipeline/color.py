"""What a picture's numbers mean: matrix, range, primaries and transfer curve.

In: a decoded picture with its tags. Out: a `Color`, and a ClipError for those that cannot or must not
become frames. Tags are followed; the majority of files has none, and takes the rule players use, which is
right more often than one matrix for all and is recorded with every sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc

from pipeline.clip import HDR
from schemas.config import PictureConfig
from schemas.errors import ClipError

_MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
"""FFmpeg's AVColorSpace numbers that swscale converts (BT.2020 of constant luminance, 10, as if it were
not)."""
_UNCONVERTIBLE = {8: "YCgCo", 11: "YDzDx", 14: "ICtCp", 15: "IPT-C2", 16: "YCgCo-Re", 17: "YCgCo-Ro"}
"""Those that it would silently take for something else."""
_UNTAGGED_HD_HEIGHT = 720
"""Untagged pictures of at least this coded height are taken as BT.709, lower as BT.601 (as players do)."""
TRANSFERS = {int(curve): curve.name.lower() for curve in ColorTrc}
"""FFmpeg's numbers of transfer curves, and their names here."""


@dataclass(frozen=True)
class Color:
    """How a picture's numbers are meant."""

    matrix: str
    range: str
    rule: str
    """"tagged", "rgb", "gray", or what stood in for a missing tag: "untagged:bt709"."""
    transfer: str
    wide: bool = False
    """Of the primaries of BT.2020: tagged so, or HDR without a tag."""

    @property
    def hdr(self) -> str:
        """ "PQ" or "HLG"; empty for the others."""
        return HDR.get(self.transfer, "")


def color_of(frame: VideoFrame) -> Color:
    """The colour of a picture by its tags; matrix and range, where untagged, by the rule players use."""
    transfer = TRANSFERS.get(frame.color_trc, "unspecified")
    wide = frame.color_primaries == ColorPrimaries.BT2020 or (
        frame.color_primaries == ColorPrimaries.UNSPECIFIED and transfer in HDR
    )
    if frame.format.is_rgb or frame.format.has_palette:
        return Color("rgb", "full", "rgb", transfer, wide)
    if len(frame.format.components) == 1:
        gray_range = "limited" if frame.color_range == ColorRange.MPEG else "full"
        return Color("gray", gray_range, "gray", transfer)
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    matrix, rule = _MATRICES.get(frame.colorspace) or _UNCONVERTIBLE.get(frame.colorspace), "tagged"
    if matrix is None:
        matrix = "bt709" if frame.height >= _UNTAGGED_HD_HEIGHT else "bt601"
        rule = f"untagged:{matrix}"
    return Color(matrix, "full" if full else "limited", rule, transfer, wide)


def check_color(color: Color, picture: PictureConfig) -> None:
    """ClipError `hdr` for PQ and HLG where the settings quarantine them, `no_decoder` for a matrix that
    cannot be converted."""
    if color.hdr and picture.hdr == "quarantine":
        raise ClipError(
            "hdr",
            f"an HDR clip ({color.hdr}), and picture.hdr is 'quarantine'; 'tonemap' would bring it to SDR",
        )
    if color.matrix in _UNCONVERTIBLE.values():
        raise ClipError("no_decoder", f"pictures in {color.matrix} cannot be turned into RGB")
