"""Samples on a dataset's report: a few that are drawn by lot, and of each its frames, its words, its PSNR.

What cannot be shown costs its picture and leaves a sentence: a source that is gone, latents that are
damaged, an encoder that is not at hand.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.console import Pace
from jobs.looking import SHOWN_COLUMNS, Look, Looker
from jobs.page import PAPER, cell_size, enlarged, spread
from jobs.report_page import inline
from pipeline.fidelity import choose_samples
from schemas.card import Card
from schemas.config import LimitsConfig, SourcesConfig
from schemas.errors import LatentpressError, RunError

_COLUMNS, _GAP = 4, 4
"""Frames of a sample, and pixels between them."""
_QUALITY = 82


def draw_chosen(
    dataset: str | Path, card: Card, *, count: int, vae: str | None
) -> tuple[list[dict[str, Any]], str | None]:
    """Up to `count` samples, the same ones every time, and why there are no pictures, where there are none.

    `vae`: where the video encoder is now; an error where that is given and not the one.
    """
    rows = choose_samples(dataset, card, count, also=SHOWN_COLUMNS)
    if not rows:
        return [], None
    shown, pace = [], Pace("samples")
    try:
        looker = Looker(dataset, card, limits=LimitsConfig(), sources=SourcesConfig(), vae=vae)
    except LatentpressError as error:
        if vae is not None:
            raise
        return [], str(error)
    with looker:
        for row in rows:
            told: dict[str, Any] = {name: row[name] for name in ("sample_id", "source", "caption", "bucket")}
            try:
                shown.append(told | _shown(looker.look(row)))
            except RunError as error:  # no memory for one of them is none for the next
                return shown, str(error)
            except LatentpressError as error:
                shown.append(told | {"psnr_db": None, "facts": [], "notes": [str(error)], "picture": None})
            pace.tick(len(shown), f"{len(rows)} are shown")
    return shown, None


def _shown(look: Look) -> dict[str, Any]:
    chosen = spread(len(look.decoded), _COLUMNS)
    file = io.BytesIO()
    _strip(look, chosen).save(file, "JPEG", quality=_QUALITY)
    return {
        "psnr_db": round(float(np.mean(look.psnr)), 2) if look.psnr else None,
        "worst_frame_db": min(look.psnr, default=None),
        "facts": look.facts,
        "notes": [*look.notes, *look.clip["notes"]],
        "picture": inline(file.getvalue(), "image/jpeg"),
        "times": [look.times[i] for i in chosen],
        "scores": [look.psnr[i] for i in chosen] if look.psnr else [],
    }


def _strip(look: Look, chosen: np.ndarray) -> Image.Image:
    """The `chosen` frames side by side: those of the source, where it is there, over those of the latents."""
    rows = [frames[chosen] for frames in (look.source, look.decoded) if frames is not None]
    width, height = cell_size(*look.decoded.shape[2:0:-1])
    across, down = width + _GAP, height + _GAP
    picture = Image.new("RGB", (len(chosen) * across - _GAP, len(rows) * down - _GAP), PAPER)
    for top, frames in enumerate(rows):
        for left, frame in enumerate(frames):
            picture.paste(enlarged(frame, (width, height)), (left * across, top * down))
    return picture
