"""Manifest rows -> the next manifest generation, and generations -> units of work.

Generations are append-only and exclusively created, so unit boundaries never move when data is
added, and two drivers on one dataset agree on them. A unit is pending until its commit record exists; its
rows are described when an executor takes it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np

from pipeline.changes import Changes, find_changes
from pipeline.clip import Placed
from pipeline.commit import commit_once
from pipeline.source import Source
from pipeline.survey import survey
from schemas.card import Card, read_card
from schemas.config import SEVERAL, PreprocessConfig
from schemas.dataset import Dataset
from schemas.errors import ClipError
from schemas.history import KEY, Held, History
from schemas.manifest import ManifestRow
from schemas.sample import EMPTY_PROMPT_UNIT, Family
from schemas.tables import sealed_parquet

_FIELDS: dict[Family, tuple[str, ...]] = {
    "latents": ("path", "source", "source_digest", "size", "mtime_ns", "start_s", "end_s", "clip"),
    "prompts": ("caption",),
}


Look = Callable[[Iterable[ManifestRow], PreprocessConfig], Iterable[tuple[ManifestRow, Placed | ClipError]]]


def known_sources(history: History) -> dict[tuple[str, int, int], str]:
    """(path, size, mtime_ns) -> digest of every file any generation saw."""
    path, size, mtime, digest = (
        history.table[name].to_pylist() for name in ("path", "size", "mtime_ns", "source_digest")
    )
    return dict(zip(zip(path, size, mtime, strict=True), digest, strict=True))


def split_into_clips(
    rows: Sequence[ManifestRow],
    config: PreprocessConfig,
    *,
    history: History,
    sources: Mapping[str, Source],
    look: Look | None = None,
) -> list[ManifestRow]:
    """One row per clip, where `frames.clips` makes several of a row.

    How many there are depends on the file alone, so a file and window that the dataset knows keep their
    number; the others are looked at (`look`, `survey` by default). A row that cannot be placed stays one,
    its unit will say why, and is looked at again the next time.
    """
    if config.frames.clips not in SEVERAL:
        return list(rows)
    live = history.live_table(["source_digest", "start_s", "end_s", "clips"])
    known = {(row["source_digest"], row["start_s"], row["end_s"]): row["clips"] for row in live.to_pylist()}

    def key(row: ManifestRow) -> tuple[str, float | None, float | None]:
        return (sources[row.path].digest, row.start_s, row.end_s)

    new = {key(row): row for row in rows if not known.get(key(row))}
    for row, found in (look or survey)(new.values(), config):
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
    history: History | None = None,
) -> tuple[History, Changes]:
    """Append what changed against the live rows as a new generation; the history with it, and what it is.

    Where another driver appends first, its generation is read and the difference taken anew.
    """
    history = dataset.history(history)
    while True:
        changes = find_changes(
            dataset, card, rows=rows, sources=sources, unit_rows=unit_rows, history=history
        )
        path = dataset.generation_path(history.generations)
        if not changes.table.num_rows or commit_once(path, sealed_parquet(changes.table)):
            return history.with_generation(changes.table), changes
        history = dataset.history(history)


@dataclass(frozen=True)
class Unit:
    """One unit of work: everything a worker needs to make its shard."""

    family: Family
    number: int
    rows: tuple[dict[str, Any], ...]
    """Each a key and a caption, or the source and its window."""


class _WhenTaken(Sequence[Unit]):
    """Units that are described when they are taken."""

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> list[Unit]: ...
    def __getitem__(self, index: int | slice) -> Unit | list[Unit]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._take(range(len(self))[index])

    @abstractmethod
    def _take(self, index: int) -> Unit:
        """That at `index`, counted from the first."""


class Units(_WhenTaken):
    """Units in order, each described when it is taken, so that the driver never holds the rows of all."""

    def __init__(
        self, history: History, family: Family, held: Held, wanted: np.ndarray, *, first: Unit | None = None
    ) -> None:
        """Those of `wanted`; `first` comes before them, and is not among them."""
        rows = np.flatnonzero(held.live & np.isin(held.unit, wanted))
        self.family, self._first = family, [first] if first else []
        self.num_rows = len(rows) + sum(len(unit.rows) for unit in self._first)
        self.numbers, starts = np.unique(held.unit[rows], return_index=True)
        self._bounds = np.append(starts, len(rows))
        table = history.table.select([KEY[family], *_FIELDS[family]])
        self._table = table.take(held.row[rows]).combine_chunks()

    def __len__(self) -> int:
        return len(self._first) + len(self.numbers)

    def _take(self, index: int) -> Unit:
        if index < len(self._first):
            return self._first[index]
        index -= len(self._first)
        start, stop = self._bounds[index : index + 2].tolist()
        rows = self._table.slice(start, stop - start).to_pylist()
        described = [{"key": row.pop(KEY[self.family]), **row} for row in rows]
        return Unit(self.family, int(self.numbers[index]), tuple(described))


class InTurn(_WhenTaken):
    """The units of one family after those of another."""

    def __init__(self, parts: Sequence[Units]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def _take(self, index: int) -> Unit:
        for units in self._parts:
            if index < len(units):
                return units[index]
            index -= len(units)
        raise IndexError(index)


def pending_units(dataset: Dataset, family: Family, history: History | None = None) -> Units:
    """Units that hold live rows and have no commit record yet, in order.

    A unit's rows are the live ones of those that belong to it. A row that is removed when its unit runs is
    not in it; if it is asked for again, it gets a place in another unit. The empty prompt is asked for by no
    row, and always.
    """
    history = history or dataset.history()
    held, done = history.held(family), dataset.finished()[family]
    empty = None
    if family == "prompts" and EMPTY_PROMPT_UNIT not in done:
        key = read_card(dataset.root).empty_prompt
        empty = Unit(family, EMPTY_PROMPT_UNIT, ({"key": key, "caption": ""},))
        done = np.append(done, EMPTY_PROMPT_UNIT)
    return Units(history, family, held, np.setdiff1d(held.unit[held.live], done), first=empty)
