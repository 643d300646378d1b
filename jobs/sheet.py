"""The contact sheet of `inspect`: source frames, decoded latents and their difference, in columns.

In: frames and the words around them. Out: one RGB picture.

F pixel frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from jobs.page import INK, SOFT, Page, cell_size, row_width, spread

DIFFERENCE_GAIN = 4


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
    chosen = spread(num_frames, columns)
    cell = cell_size(width, height)
    page = Page(row_width(cell, columns=len(chosen)))

    page.ends(sheet.title, sheet.score, size=24)
    page.paragraph(sheet.details, size=15, color=SOFT, max_lines=3)
    page.paragraph(sheet.caption, size=17, color=INK, max_lines=4)
    page.skip(10)
    page.labels([sheet.times[i] for i in chosen], cell=cell)
    if sheet.source is not None:
        page.frames("source", sheet.source[chosen], cell=cell)
    page.frames("decoded", sheet.decoded[chosen], cell=cell)
    if sheet.source is not None:
        difference = np.abs(sheet.source[chosen].astype(np.int16) - sheet.decoded[chosen])
        amplified = (difference * DIFFERENCE_GAIN).clip(0, 255).astype(np.uint8)
        page.frames(f"difference\nx {DIFFERENCE_GAIN}", amplified, cell=cell)
        page.labels([sheet.scores[i] for i in chosen], cell=cell)
    return page.picture()
