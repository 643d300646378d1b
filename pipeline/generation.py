"""Manifest rows -> the next manifest generation: which rows are new, which went, which unit holds each.

Generations are append-only and exclusively created, so unit boundaries never move when data is
added, and two drivers on one dataset agree on them. Rows are matched by what they are, so order,
duplicates of content and edited captions change only what they must.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.commit import commit_once
from pipeline.source import Source
from schemas.card import Card
from schemas.dataset import GENERATION_SCHEMA, Dataset, GenerationRow, generation_key
from schemas.index import parquet_bytes
from schemas.manifest import ManifestRow
from schemas.sample import Family, caption_digest, sample_id


@dataclass(frozen=True)
class Unit:
    """One unit of work: everything a worker needs to make its shard."""

    family: Family
    number: int
    rows: tuple[dict[str, Any], ...]
    """Latents: key, path, source, start_s, end_s. Prompts: key, caption."""


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


def known_sources(dataset: Dataset) -> dict[tuple[str, int, int], str]:
    """(path, size, mtime_ns) -> digest of every file any generation saw."""
    return {
        (row["path"], row["size"], row["mtime_ns"]): row["source_digest"]
        for table in dataset.generations()
        for row in table.to_pylist()
    }


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
        added = sum(row["op"] == "add" for row in changes)
        counts = {"added": added, "removed": len(changes) - added}
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
    live = {generation_key(row): row for row in dataset.live_rows()}
    changes: list[GenerationRow] = []
    for row in rows:
        source = sources[row.path]
        key = sample_id(
            source.digest,
            start_s=row.start_s,
            end_s=row.end_s,
            fingerprint=card.family_fingerprint("latents"),
        )
        old = live.pop(row.key, None)
        if old is not None and old["sample_id"] == key:
            continue
        if old is not None:  # the file's content changed under the same name
            changes.append({**old, "op": "remove"})
        caption_key = caption_digest(row.caption, fingerprint=card.family_fingerprint("prompts"))
        changes.append(
            {
                "op": "add",
                "sample_id": key,
                "source": row.source,
                "path": row.path,
                "source_digest": source.digest,
                "size": source.size,
                "mtime_ns": source.mtime_ns,
                "start_s": row.start_s,
                "end_s": row.end_s,
                "caption": row.caption,
                "caption_digest": caption_key,
                "unit": latents.unit_of(key),
                "prompt_unit": prompts.unit_of(caption_key),
                "extra": json.dumps(row.extra, sort_keys=True, default=str) if row.extra else "",
            }
        )
    return [*changes, *({**row, "op": "remove"} for row in live.values())]


def pending_units(dataset: Dataset, family: Family) -> list[Unit]:
    """Units that hold live rows and have no commit record yet, in order.

    A unit's rows are all keys ever put into it, also those no longer asked for: what a unit holds
    never depends on when it runs.
    """
    key, number = ("sample_id", "unit") if family == "latents" else ("caption_digest", "prompt_unit")
    held: dict[int, dict[str, GenerationRow]] = {}
    for table in dataset.generations():
        for row in table.to_pylist():
            if row["op"] == "add":
                held.setdefault(row[number], {})[row[key]] = row
    wanted = {row[number] for row in dataset.live_rows()}
    pending = sorted(unit for unit in wanted if not dataset.commit_path(family, unit).exists())
    fields = ("path", "source", "start_s", "end_s") if family == "latents" else ("caption",)
    return [
        Unit(
            family,
            unit,
            tuple({"key": name, **{f: row[f] for f in fields}} for name, row in held[unit].items()),
        )
        for unit in pending
    ]
