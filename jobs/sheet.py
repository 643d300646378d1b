"""The contact sheet of `inspect`: source frames, decoded latents and their difference, in columns.

In: frames and the words around them. Out: one RGB picture. Plain pixels placed by hand, so that
frames keep their aspect ratio, text never overlaps or leaves the page, and nothing needs a display.

F pixel frames, H, W pixels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

DIFFERENCE_GAIN = 4

_CELL = (240, 270)
"""Largest width and height of one drawn frame: landscape fills the first, portrait the second."""
_MARGIN, _GAP, _LABEL_WIDTH, _MIN_WIDTH = 28, 6, 104, 900
_INK, _SOFT, _PAPER = (24, 24, 27), (100, 100, 110), (255, 255, 255)
_LINE = 1.4
"""Line height in font sizes."""


@dataclass(frozen=True)
class Sheet:
    """Everything that is drawn."""

    title: str
    score: str
    """Shown at the right of the title."""
    details: str
    caption: str
    times: Sequence[str]
    """One label per frame."""
    scores: Sequence[str]
    """One label per frame; empty without a source."""
    decoded: np.ndarray
    """uint8 [F, H, W, 3]."""
    source: np.ndarray | None
    """As `decoded`; None where there is nothing to compare with."""


def draw_sheet(sheet: Sheet, *, columns: int) -> Image.Image:
    """At most `columns` frames, evenly spread, the first and the last among them."""
    num_frames, height, width, _ = sheet.decoded.shape
    chosen = np.linspace(0, num_frames - 1, min(columns, num_frames)).round().astype(int)
    shrink = min(_CELL[0] / width, _CELL[1] / height)
    cell = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    grid = _LABEL_WIDTH + len(chosen) * cell[0] + (len(chosen) - 1) * _GAP
    page = _Page(max(grid, _MIN_WIDTH))

    page.ends(sheet.title, sheet.score, size=24)
    page.paragraph(sheet.details, size=15, color=_SOFT, max_lines=3)
    page.paragraph(sheet.caption, size=17, color=_INK, max_lines=4)
    page.skip(10)
    lefts = [_LABEL_WIDTH + i * (cell[0] + _GAP) for i in range(len(chosen))]
    page.labels([sheet.times[i] for i in chosen], lefts=lefts)
    if sheet.source is not None:
        page.frames("source", sheet.source[chosen], cell=cell, lefts=lefts)
    page.frames("decoded", sheet.decoded[chosen], cell=cell, lefts=lefts)
    if sheet.source is not None:
        difference = np.abs(sheet.source[chosen].astype(np.int16) - sheet.decoded[chosen])
        amplified = (difference * DIFFERENCE_GAIN).clip(0, 255).astype(np.uint8)
        page.frames(f"difference\nx {DIFFERENCE_GAIN}", amplified, cell=cell, lefts=lefts)
        page.labels([sheet.scores[i] for i in chosen], lefts=lefts)
    return page.picture()


class _Page:
    """A picture that grows downwards, piece by piece."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._image = Image.new("RGB", (width + 2 * _MARGIN, 4000), _PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self._y = float(_MARGIN)

    def skip(self, pixels: float) -> None:
        self._y += pixels

    def ends(self, left: str, right: str, *, size: int) -> None:
        """One bold line with text at both ends; the left one gives way."""
        font = _font(size, bold=True)
        room = self._width - self._draw.textlength(right, font) - size
        self._text(0, self._fit(left, font, room), font, _INK)
        self._text(self._width - self._draw.textlength(right, font), right, font, _INK)
        self.skip(size * _LINE + 4)

    def paragraph(self, text: str, *, size: int, color: tuple[int, int, int], max_lines: int) -> None:
        font = _font(size)
        lines = self._wrap(text[: max_lines * self._width], font)  # no letter is narrower than a pixel
        if len(lines) > max_lines:
            lines = [*lines[: max_lines - 1], self._fit(" ".join(lines[max_lines - 1 :]), font, self._width)]
        for line in lines:
            self._text(0, line, font, color)
            self.skip(size * _LINE)
        self.skip(4)

    def labels(self, texts: Sequence[str], *, lefts: Sequence[int]) -> None:
        font = _font(14)
        for text, left in zip(texts, lefts, strict=True):
            self._text(left, text, font, _SOFT)
        self.skip(14 * _LINE)

    def frames(self, label: str, frames: np.ndarray, *, cell: tuple[int, int], lefts: Sequence[int]) -> None:
        """A row of pictures with its name on the left, at half height."""
        font = _font(15, bold=True)
        lines = label.split("\n")
        top = self._y + (cell[1] - len(lines) * 15 * _LINE) / 2
        for i, line in enumerate(lines):
            self._draw.text((_MARGIN, top + i * 15 * _LINE), line, _INK, font)
        for frame, left in zip(frames, lefts, strict=True):
            enlarging = cell[0] > frame.shape[1]
            filter_ = Image.Resampling.NEAREST if enlarging else Image.Resampling.LANCZOS
            self._image.paste(Image.fromarray(frame).resize(cell, filter_), (_MARGIN + left, round(self._y)))
        self.skip(cell[1] + _GAP)

    def picture(self) -> Image.Image:
        return self._image.crop((0, 0, self._image.width, round(self._y) + _MARGIN))

    def _text(
        self, left: float, text: str, font: ImageFont.FreeTypeFont, color: tuple[int, int, int]
    ) -> None:
        self._draw.text((_MARGIN + left, self._y), text, color, font)

    def _wrap(self, text: str, font: ImageFont.FreeTypeFont) -> list[str]:
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".lstrip()
            if self._draw.textlength(longer, font) <= self._width:
                lines[-1] = longer
            else:
                lines.append(self._fit(word, font, self._width))
        return [line for line in lines if line]

    def _fit(self, text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
        """`text` on one line, or as much of its beginning as fits, with an ellipsis."""
        text = " ".join(text.split())
        if self._draw.textlength(text, font) <= room:
            return text
        cuts = range(len(text))
        kept = bisect_right(cuts, room, key=lambda cut: self._draw.textlength(text[:cut] + "…", font))
        return text[: max(0, kept - 1)] + "…"


@cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: the same on every machine, and wide in scripts."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
