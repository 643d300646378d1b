"""One unit of an import -> one committed shard, from the files of a cache.

In: rows of a unit, the reader. Out: a commit record. Values keep their bits where they were not scaled;
scaled ones are unscaled in float32. A file that is torn, or holds NaN or Inf, costs its row and nothing else.
Work is reading and writing, so one process does it; memory is one sample.

T latent frames, C latent channels, H, W latent cells.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.commit import Committing
from pipeline.generation import Unit
from pipeline.imports.cache import Cache, CachedClip
from pipeline.imports.files import carried, finite
from pipeline.imports.survey import Reading, placed
from pipeline.shard_writer import ShardWriter
from pipeline.source import Source, same_content
from pipeline.text_encode import TextEncoder
from pipeline.unit import UnitResult, failure_of, result_of
from schemas.card import Card
from schemas.codec import Tensor, from_float32
from schemas.dataset import Dataset
from schemas.errors import ClipError, RunError
from schemas.sample import FailureRecord
from schemas.scaling import unscale

NO_EMPTY_PROMPT = "no_empty_prompt"
"""Reason under which the unit of the empty prompt says that there is none."""


@dataclass(frozen=True)
class Sources:
    """Where the samples of an import come from."""

    clips: Mapping[str, CachedClip]
    """By the path of the latents."""
    prompts: Mapping[str, tuple[Path, ...]]
    """Files of its embeddings, by caption."""
    text: TextEncoder | None
    """Makes the empty prompt where `prompts` has none."""
    masked: bool
    """Whether prompts have masks; where not, every row counts, of the empty one too."""


class Importer:
    """Makes the units of one import."""

    def __init__(
        self,
        dataset: Dataset,
        card: Card,
        cache: Cache,
        sources: Sources,
        *,
        read: Reading,
        fps: float,
        committing: Committing,
    ) -> None:
        self._dataset, self._card, self._cache, self._sources = dataset, card, cache, sources
        self._read, self._fps, self._committing = read, fps, committing

    def run(self, unit: Unit, *, lost: Collection[str] = ()) -> UnitResult:
        """Make and commit one unit. `lost` are the samples whose prompts failed: they fail with them."""
        started = time.perf_counter()
        failures: list[FailureRecord] = []
        with ShardWriter(
            self._dataset,
            family=unit.family,
            unit=unit.number,
            fingerprint=self._card.family_fingerprint(unit.family),
            committing=self._committing,
        ) as shard:
            for row in unit.rows:
                try:
                    if row["key"] in lost:
                        raise ClipError("no_prompt", "its prompt embeddings cannot be read", stage="import")
                    tensors, meta = self._prompt(row) if unit.family == "prompts" else self._latents(row)
                except ClipError as error:
                    failures.append(failure_of(row["key"], error))
                    continue
                shard.add(row["key"], tensors, meta=meta)
            commit = shard.commit(quarantined=failures, seconds={})
        total_s = time.perf_counter() - started
        seconds = {"write": total_s, "total": total_s}
        return dataclasses.replace(result_of(unit, commit, shard), seconds=seconds)

    def _prompt(self, row: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        paths = self._sources.prompts.get(row["caption"])
        if paths is None:
            return self._empty_prompt()
        prompt = self._cache.prompt([self._read(path) for path in paths])
        finite([prompt.embeds], path=paths[0])
        mask = np.ones(len(prompt.embeds), np.uint8)
        if prompt.mask is not None:
            mask = (prompt.mask != 0).numpy().astype(np.uint8)
        meta = {
            "num_tokens": int(mask.sum()) if prompt.mask is not None else None,
            "truncated": None,
            "segments": list(prompt.segments),
            "files": [path.name for path in paths],
        }
        return {"prompt_embeds": carried(prompt.embeds), "prompt_mask": Tensor("U8", mask)}, meta

    def _empty_prompt(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self._sources.text is None:
            raise ClipError(
                NO_EMPTY_PROMPT,
                "the cache has no embeddings of the empty caption, and no --text-encoder was given",
                stage="import",
            )
        (encoding,) = self._sources.text.encode([""])
        tensors, mask = encoding.tensors, encoding.tensors["prompt_mask"].data
        if not self._sources.masked:
            tensors = tensors | {"prompt_mask": Tensor("U8", np.ones_like(mask))}
        return tensors, {"num_tokens": encoding.num_tokens, "truncated": encoding.truncated}

    def _latents(self, row: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        clip = self._sources.clips[row["path"]]
        if not same_content(row["path"], Source(row["source_digest"], row["size"], row["mtime_ns"])):
            raise RunError(f"{row['path']} was replaced while it was imported; run the same command again")
        latents = self._cache.latents(self._read(clip.path))
        bucket, _ = placed(clip, latents, self._card.geometry)
        finite([latents.values], path=clip.path)
        if self._cache.scaled:
            unscaled = unscale(latents.values.float().numpy(), self._card.scaling)
            tensors = {"latents": from_float32(unscaled, dtype="F32")}
        elif self._card.stored == "moments":
            mean, logvar = latents.values.split(self._card.geometry.channels, dim=1)
            tensors = {"mean": carried(mean), "logvar": carried(logvar)}
        else:
            tensors = {"latents": carried(latents.values)}
        return tensors, {**bucket.model_dump(), "clip": _clip(clip, bucket.num_frames, self._fps)}


def _clip(clip: CachedClip, num_frames: int, fps: float) -> dict[str, Any]:
    """What is known of how the frames were taken: little. Times are those the user's rate gives."""
    return {
        "imported_from": clip.path.name,
        "source_fps": None,
        "effective_fps": fps,
        "pts_s": [round(frame / fps, 6) for frame in range(num_frames)],
        "coverage": None,
        "frame_weights": None,
        **{name: [] for name in ("interpolated", "duplicated", "repaired")},
        "notes": [f"frames are taken to be 1/{fps:g} s apart, as --fps says"],
    }
