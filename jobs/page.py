"""A page of rows of frames with words around them: pieces are added from the top, one RGB picture comes out.

Plain pixels placed by hand, so that frames keep their aspect ratio, text never overlaps or leaves the page,
and nothing needs a display.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_CELL = (240, 270)
"""Largest width and height of one drawn frame: landscape fills the first, portrait the second."""
_MARGIN, _GAP, _LABEL_WIDTH, _MIN_WIDTH = 28, 6, 104, 900
_HEIGHT = 4000
"""Pixels of paper that are added at once."""
INK, SOFT, PAPER = (24, 24, 27), (100, 100, 110), (255, 255, 255)
_LINE = 1.4
"""Line height in font sizes."""


def spread(num_frames: int, columns: int) -> np.ndarray:
    """Positions of at most `columns` frames, evenly spread, the first and the last among them."""
    chosen: np.ndarray = np.linspace(0, num_frames - 1, min(columns, num_frames)).round().astype(int)
    return chosen


def cell_size(width: int, height: int) -> tuple[int, int]:
    """Width and height at which frames of this size are drawn."""
    shrink = min(_CELL[0] / width, _CELL[1] / height)
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def row_width(cell: tuple[int, int], *, columns: int) -> int:
    """Of a page that has room for a row of so many frames, and for words."""
    return max(_LABEL_WIDTH + columns * (cell[0] + _GAP) - _GAP, _MIN_WIDTH)


def enlarged(frame: np.ndarray, cell: tuple[int, int]) -> Image.Image:
    """A frame at the size of its cell; its own pixels stay visible where that is larger."""
    enlarging = cell[0] > frame.shape[1]
    filter_ = Image.Resampling.NEAREST if enlarging else Image.Resampling.LANCZOS
    return Image.fromarray(frame).resize(cell, filter_)


def fitted(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """`text` on one line, or as much of its beginning as fits in `room` pixels, with an ellipsis."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    kept = bisect_right(range(len(text)), room, key=lambda cut: font.getlength(text[:cut] + "…"))
    return text[: max(0, kept - 1)] + "…"


def _left(column: int, cell: tuple[int, int]) -> int:
    return _LABEL_WIDTH + column * (cell[0] + _GAP)


class Page:
    """A picture that grows downwards, piece by piece."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._image = Image.new("RGB", (width + 2 * _MARGIN, _HEIGHT), PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self._y = float(_MARGIN)

    def skip(self, pixels: float) -> None:
        self._y += pixels

    def ends(self, left: str, right: str, *, size: int) -> None:
        """One bold line with text at both ends; the left one gives way."""
        font = sheet_font(size, bold=True)
        room = self._width - self._draw.textlength(right, font) - size
        self._text(0, fitted(left, font, room), font, INK)
        self._text(self._width - self._draw.textlength(right, font), right, font, INK)
        self.skip(size * _LINE + 4)

    def paragraph(self, text: str, *, size: int, color: tuple[int, int, int], max_lines: int) -> None:
        font = sheet_font(size)
        lines = self._wrap(text[: max_lines * self._width], font)  # no letter is narrower than a pixel
        if len(lines) > max_lines:
            lines = [*lines[: max_lines - 1], fitted(" ".join(lines[max_lines - 1 :]), font, self._width)]
        for line in lines:
            self._text(0, line, font, color)
            self.skip(size * _LINE)
        self.skip(4)

    def labels(self, texts: Sequence[str], *, cell: tuple[int, int]) -> None:
        """A line of words over, or under, a row of pictures."""
        font = sheet_font(14)
        for column, text in enumerate(texts):
            self._text(_left(column, cell), text, font, SOFT)
        self.skip(14 * _LINE)

    def frames(self, label: str, frames: np.ndarray, *, cell: tuple[int, int]) -> None:
        """A row of pictures with its name on the left, at half height."""
        self._make_room(cell[1])
        font = sheet_font(15, bold=True)
        lines = label.split("\n")
        top = self._y + (cell[1] - len(lines) * 15 * _LINE) / 2
        for i, line in enumerate(lines):
            self._draw.text((_MARGIN, top + i * 15 * _LINE), line, INK, font)
        for column, frame in enumerate(frames):
            self._image.paste(enlarged(frame, cell), (_MARGIN + _left(column, cell), round(self._y)))
        self.skip(cell[1] + _GAP)

    def picture(self) -> Image.Image:
        return self._image.crop((0, 0, self._image.width, round(self._y) + _MARGIN))

    def _make_room(self, height: float) -> None:
        """Paper for what is drawn next."""
        if self._y + height + _MARGIN > self._image.height:
            longer = Image.new("RGB", (self._image.width, self._image.height + _HEIGHT), PAPER)
            longer.paste(self._image, (0, 0))
            self._image, self._draw = longer, ImageDraw.Draw(longer)

    def _text(
        self, left: float, text: str, font: ImageFont.FreeTypeFont, color: tuple[int, int, int]
    ) -> None:
        self._make_room(font.size * _LINE)
        self._draw.text((_MARGIN + left, self._y), text, color, font)

    def _wrap(self, text: str, font: ImageFont.FreeTypeFont) -> list[str]:
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".lstrip()
            if self._draw.textlength(longer, font) <= self._width:
                lines[-1] = longer
            else:
                lines.append(fitted(word, font, self._width))
        return [line for line in lines if line]


@cache
def sheet_font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: the same on every machine, and wide in scripts."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
