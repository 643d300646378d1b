"""Samples looked at: index rows in; what their latents decode to, their sources, and words for both, out.

The source is decoded again, sandboxed, with the settings in the dataset's card, so the two differ by the
encoder alone; where the file is gone or another one, the latents are looked at without it. Memory is one
sample.

F pixel frames, H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from jobs.sheet import Sheet
from pipeline.fidelity import Redecoder, card_encoder, decode, frame_psnr
from schemas.card import Card
from schemas.codec import as_float32
from schemas.config import LimitsConfig, SourcesConfig
from schemas.dataset import Dataset
from schemas.errors import DatasetError
from schemas.index import read_tensor

SHOWN_COLUMNS = ("caption", "unit")
"""Columns of an index row that a look needs beside those that `Redecoder` does."""


@dataclass(frozen=True)
class Look:
    """One sample."""

    clip: dict[str, Any]
    """How it was decoded when it was encoded, from its commit record."""
    decoded: np.ndarray
    """uint8 [F, H, W, 3]."""
    source: np.ndarray | None
    """As `decoded`; None where there is nothing to compare with, valid until the next look."""
    psnr: list[float]
    """Decibels of each frame; empty without a source."""
    notes: list[str]
    """Why there is no source."""
    facts: list[str]
    """What the sample is, a few words each."""

    @property
    def score(self) -> str:
        if not self.psnr:
            return ""
        return f"PSNR {np.mean(self.psnr):.1f} dB, worst frame {min(self.psnr):.1f} dB"

    @property
    def times(self) -> list[str]:
        """Source seconds per frame, and what is not a picture of the source."""
        marks = {i: name for name in ("duplicated", "interpolated", "repaired") for i in self.clip[name]}
        return [
            f"{seconds:.2f} s {marks.get(i, '')}".rstrip() for i, seconds in enumerate(self.clip["pts_s"])
        ]

    def sheet(self, *, title: str, details: str, caption: str) -> Sheet:
        """What `draw_sheet` draws, under these words."""
        return Sheet(
            title=title,
            score=self.score,
            details=details,
            caption=caption,
            times=self.times,
            scores=[f"{value:.1f} dB" for value in self.psnr],
            decoded=self.decoded,
            source=self.source,
        )


class Looker:
    """Looks at samples of one dataset; a context manager."""

    def __init__(
        self,
        dataset: str | Path,
        card: Card,
        *,
        limits: LimitsConfig,
        sources: SourcesConfig,
        vae: str | None,
    ) -> None:
        """DatasetError or StaleDatasetError where the encoder cannot be had; `vae` is where it is now."""
        self._dataset, self._card = dataset, card
        self._encoder = card_encoder(dataset, card, vae=vae)
        self._redecoder = Redecoder(card, limits=limits, sources=sources)

    def __enter__(self) -> Self:
        self._redecoder.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        self._redecoder.__exit__(*failure)

    def look(self, row: dict[str, Any]) -> Look:
        """DatasetError where what is stored is damaged, RunError where memory runs out."""
        clip = _clip_record(self._dataset, row)
        latents = read_tensor(self._dataset, row, self._card.latent_tensors[0])
        decoded = decode(self._encoder, as_float32(latents), tiled=self._card.is_tiled(row["bucket"]))
        found = self._redecoder.frames(row)
        if not isinstance(found, str) and found.shape != decoded.shape:
            found = f"source now gives frames {found.shape}, the latents {decoded.shape}"
        source, notes = (None, [found]) if isinstance(found, str) else (found, [])
        return Look(
            clip=clip,
            decoded=decoded,
            source=source,
            psnr=[] if source is None else frame_psnr(source, decoded),
            notes=notes,
            facts=_facts(row, clip, self._card),
        )


def _clip_record(dataset: str | Path, row: dict[str, Any]) -> dict[str, Any]:
    """How the clip was decoded, from the commit record of its unit."""
    commit = Dataset(dataset).commit("latents", row["unit"])
    for sample in commit.samples if commit else ():
        if sample.key == row["sample_id"]:
            clip: dict[str, Any] = sample.meta["clip"]
            return clip
    raise DatasetError(
        f"unit {row['unit']} has no commit record of sample {row['sample_id']}; "
        f"run `latentpress verify {dataset}`"
    )


def _facts(row: dict[str, Any], clip: dict[str, Any], card: Card) -> list[str]:
    stored = [
        f"{row['dtype']} latents {'x'.join(map(str, row['shape']))}",
        f"sample {row['sample_id'][:12]}",
    ]
    frames, resize = card.settings.frames, card.settings.resize
    if frames is None or resize is None:
        return [f"imported from {card.imported_from}", row["bucket"], *stored]
    turned = f" rotated {clip['rotation']}°" if clip["rotation"] else ""
    synthetic = {name: len(clip[name]) for name in ("interpolated", "duplicated", "repaired")}
    return [
        f"{clip['codec']} in {clip['container'].split(',')[0]}",
        f"{clip['source_width']}x{clip['source_height']}{turned}, {clip['source_fps']:.4g} fps, "
        f"{clip['duration_s']:.2f} s",
        f"{row['bucket']} {resize.mode}",
        f"{frames.policy} at {clip['effective_fps']:.3g} frames/s over {clip['coverage']:.0%} of the clip",
        *(f"{count} frames {name}" for name, count in synthetic.items() if count),
        *stored,
    ]
