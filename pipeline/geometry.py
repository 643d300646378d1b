"""Where the pixels of a picture go: its orientation, its display shape, its fit into a bucket.

In: coded size, sample aspect ratio, display matrix, target size. Out: a crop of the coded picture and a
scaled size, in the coded orientation; turning comes last, on the small result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from av.video.frame import VideoFrame


@dataclass(frozen=True)
class Orientation:
    """How a player turns the coded picture: transpose first, then flips."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @property
    def rotation(self) -> int:
        """Degrees clockwise, leaving a mirror image aside."""
        if self.transpose:
            return 270 if self.flip_rows else 90
        return 180 if self.flip_rows else 0

    @property
    def mirrored(self) -> bool:
        return (self.transpose + self.flip_rows + self.flip_columns) % 2 == 1

    def apply(self, plane: np.ndarray) -> np.ndarray:
        """A view of a [rows, columns] plane as it is shown."""
        turned = plane.T if self.transpose else plane
        return turned[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


def orientation_of(frame: VideoFrame) -> Orientation:
    """The display matrix of a picture, to the nearest quarter turn."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Orientation()
    # x' = a x + c y, y' = b x + d y in 16.16 fixed point; y points down.
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(data), "=i4")[:5])
    if max(abs(a), abs(d)) >= max(abs(b), abs(c)):
        return Orientation(False, flip_rows=d < 0, flip_columns=a < 0)
    return Orientation(True, flip_rows=b < 0, flip_columns=c < 0)


def display_size(width: int, height: int, *, sar: Fraction, orientation: Orientation) -> tuple[int, int]:
    """Pixels a player shows, at the coded height."""
    shown = max(1, round(width * sar))
    return (height, shown) if orientation.transpose else (shown, height)


@dataclass(frozen=True)
class Fit:
    """Which part of the coded picture goes where, before it is turned."""

    crop: tuple[int, int, int, int]
    """x, y, width, height in the coded picture."""
    size: tuple[int, int]
    """Width, height after scaling; smaller than the frame where `pad` leaves black bars."""


@functools.cache
def fit(width: int, height: int, *, sar: Fraction, into: tuple[int, int], mode: str) -> Fit:
    """Fit a coded picture into `into` (width, height before turning); sizes are even where they can be,
    so that subsampled chroma stays in place."""
    target_width, target_height = into
    whole = (0, 0, width, height)
    aspect = width * sar / height
    target = Fraction(target_width, target_height)
    if mode == "cover_crop" and aspect != target:
        crop_width = _even(width * target / aspect, width) if aspect > target else width
        crop_height = _even(height * aspect / target, height) if aspect < target else height
        x, y = (width - crop_width) // 4 * 2, (height - crop_height) // 4 * 2
        return Fit((x, y, crop_width, crop_height), into)
    if mode == "pad" and aspect != target:
        fitted_width = _even(target_height * aspect, target_width)
        fitted_height = _even(target_width / aspect, target_height)
        return Fit(whole, (fitted_width, fitted_height))
    return Fit(whole, into)


def _even(value: Fraction, limit: int) -> int:
    """The nearest even number of pixels that fits in `limit`."""
    return min(limit, max(2, 2 * round(value / 2)))
