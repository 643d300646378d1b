"""Manifest rows -> the next manifest generation: which rows are new, which went, which unit holds each.

Generations are append-only and exclusively created, so unit boundaries never move when data is
added, and two drivers on one dataset agree on them. Rows are matched by what they are, so order,
duplicates of content and edited captions change only what they must.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from pipeline.commit import commit_once
from pipeline.source import Source
from pipeline.survey import survey
from schemas.card import Card
from schemas.config import PreprocessConfig
from schemas.dataset import GENERATION_SCHEMA, Dataset, GenerationRow, generation_key
from schemas.errors import ClipError
from schemas.index import parquet_bytes
from schemas.manifest import ManifestRow
from schemas.sample import Family, caption_digest, sample_id


@dataclass(frozen=True)
class Unit:
    """One unit of work: everything a worker needs to make its shard."""

    family: Family
    number: int
    rows: tuple[dict[str, Any], ...]
    """Each a key, whether it is `live` (still asked for) and a caption, or the source and its window."""


@dataclass
class _Allotment:
    """Hands out units: a key keeps the unit it once got, new keys fill fresh units of `size`."""

    size: int
    units: dict[str, int] = field(default_factory=dict)
    next_unit: int = 0
    filled: int = 0

    def note(self, key: str, unit: int) -> None:
        self.units.setdefault(key, unit)
        self.next_unit = max(self.next_unit, unit + 1)

    def unit_of(self, key: str) -> int:
        if key not in self.units:
            if self.filled == 0:
                self.next_unit += 1
            self.units[key] = self.next_unit - 1
            self.filled = (self.filled + 1) % self.size
        return self.units[key]


_LATENT_FIELDS = ("path", "source", "source_digest", "size", "mtime_ns", "start_s", "end_s", "clip")


def known_sources(dataset: Dataset) -> dict[tuple[str, int, int], str]:
    """(path, size, mtime_ns) -> digest of every file any generation saw."""
    return {
        (row["path"], row["size"], row["mtime_ns"]): row["source_digest"]
        for table in dataset.generations()
        for row in table.to_pylist()
    }


def split_into_clips(
    rows: Sequence[ManifestRow], config: PreprocessConfig, *, dataset: Dataset, sources: Mapping[str, Source]
) -> list[ManifestRow]:
    """One row per clip, where `frames.clips` makes several of a row.

    How many there are depends on the file alone, so a file and window that the dataset knows keep their
    number; the others are looked at. A row that cannot be placed stays one, its unit will say why, and is
    looked at again the next time.
    """
    if config.frames.clips == "head":
        return list(rows)
    known = {
        (row["source_digest"], row["start_s"], row["end_s"]): row["clips"] for row in dataset.live_rows()
    }

    def key(row: ManifestRow) -> tuple[str, float | None, float | None]:
        return (sources[row.path].digest, row.start_s, row.end_s)

    new = {key(row): row for row in rows if not known.get(key(row))}
    for row, found in survey(new.values(), config):
        known[key(row)] = 0 if isinstance(found, ClipError) else found.num_clips
    return [
        replace(row, clip=clip, clips=known[key(row)])
        for row in rows
        for clip in range(max(1, known[key(row)]))
    ]


def add_generation(
    dataset: Dataset,
    card: Card,
    *,
    rows: Sequence[ManifestRow],
    sources: Mapping[str, Source],
    unit_rows: int,
) -> dict[str, int]:
    """Append what changed against the live rows as a new generation; counts of added and removed rows.

    Where another driver appends first, its generation is read and the difference taken anew.
    """
    while True:
        history = dataset.generations()
        changes = _changes(dataset, card, rows=rows, sources=sources, unit_rows=unit_rows, history=history)
        removed = sum(row["op"] == "remove" for row in changes)
        had = {(generation_key(row), row["sample_id"]) for row in dataset.live_rows(history)}
        noted = sum((generation_key(r), r["sample_id"]) in had for r in changes if r["op"] == "add")
        counts = {"added": len(changes) - removed - noted, "removed": removed}
        if not changes:
            return counts
        table = pa.Table.from_pylist(changes, schema=GENERATION_SCHEMA)
        if commit_once(dataset.generation_path(len(history)), parquet_bytes(table)):
            return counts


def _changes(
    dataset: Dataset,
    card: Card,
    *,
    rows: Sequence[ManifestRow],
    sources: Mapping[str, Source],
    unit_rows: int,
    history: Sequence[pa.Table],
) -> list[GenerationRow]:
    latents, prompts = _Allotment(unit_rows), _Allotment(unit_rows)
    for table in history:
        for old in table.to_pylist():
            latents.note(old["sample_id"], old["unit"])
            prompts.note(old["caption_digest"], old["prompt_unit"])
    live = {generation_key(row): row for row in dataset.live_rows(history)}
    present = {row["sample_id"] for row in live.values()}
    changes: list[GenerationRow] = []
    for row in rows:
        source = sources[row.path]
        key = sample_id(
            source.digest,
            start_s=row.start_s,
            end_s=row.end_s,
            clip=row.clip,
            fingerprint=card.family_fingerprint("latents"),
        )
        extra = json.dumps(row.extra, sort_keys=True, default=str) if row.extra else ""
        noted = {"source": row.source, "size": source.size, "mtime_ns": source.mtime_ns, "extra": extra}
        noted["clips"] = row.clips
        old = live.pop(row.key, None)
        if old is not None and old["sample_id"] == key:
            if any(old[name] != value for name, value in noted.items()):
                changes.append({**old, **noted})  # touched or annotated: the same sample, in its unit
            continue
        if old is not None:  # the file's content changed under the same name
            changes.append({**old, "op": "remove"})
        if key not in present:
            _forget_if_left_out(dataset, latents, key)
        caption_key = caption_digest(row.caption, fingerprint=card.family_fingerprint("prompts"))
        changes.append(
            {
                "op": "add",
                "sample_id": key,
                **noted,
                "path": row.path,
                "source_digest": source.digest,
                "start_s": row.start_s,
                "end_s": row.end_s,
                "clip": row.clip,
                "caption": row.caption,
                "caption_digest": caption_key,
                "unit": latents.unit_of(key),
                "prompt_unit": prompts.unit_of(caption_key),
            }
        )
    return [*changes, *({**row, "op": "remove"} for row in live.values())]


def _forget_if_left_out(dataset: Dataset, latents: _Allotment, key: str) -> None:
    """Give a row that comes back a fresh unit where its old one was committed without it.

    That happens when the row had been removed, and its file was gone or replaced, when the unit ran.
    """
    unit = latents.units.get(key)
    commit = None if unit is None else dataset.commit("latents", unit)
    if commit and key not in {*(s.key for s in commit.samples), *(f.key for f in commit.quarantined)}:
        del latents.units[key]


def pending_units(dataset: Dataset, family: Family) -> list[Unit]:
    """Units that hold live rows and have no commit record yet, in order.

    A unit's rows are all keys ever put into it, also those no longer asked for (not `live`): what a
    unit holds depends on when it runs only where a removed row's file is gone too.
    """
    key, number = ("sample_id", "unit") if family == "latents" else ("caption_digest", "prompt_unit")
    held: dict[int, dict[str, GenerationRow]] = {}
    generations = dataset.generations()
    for table in generations:
        for row in table.to_pylist():
            if row["op"] == "add":
                held.setdefault(row[number], {})[row[key]] = row
    live = dataset.live_rows(generations)
    wanted = {row[number] for row in live}
    live_keys = {row[key] for row in live}
    pending = sorted(unit for unit in wanted if not dataset.commit_path(family, unit).exists())
    fields = _LATENT_FIELDS if family == "latents" else ("caption",)

    def described(name: str, row: GenerationRow) -> dict[str, Any]:
        return {"key": name, "live": name in live_keys, **{field: row[field] for field in fields}}

    return [
        Unit(family, unit, tuple(described(name, row) for name, row in held[unit].items()))
        for unit in pending
    ]
