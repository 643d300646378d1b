"""What a dataset was ever asked for: its manifest generations as columns, and the rows that are live.

In: the tables of all generations, in order. Out: numbers of rows, as numpy arrays, and columns. No Python
object per row.

A *row* is what a manifest asks for: a path, a window, a caption, the number of the clip. Its newest entry
counts: added, or removed. A *key* is a sample_id or a caption_digest: it belongs to the unit that its
newest entry names, so a sample that is retried leaves its old unit for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.sample import EMPTY_PROMPT_UNIT, Family

TEXT = pa.large_string()
"""Of columns whose values may be long: all rows of a dataset together may hold more than 2 GiB."""
GENERATION_SCHEMA = pa.schema(
    [
        ("op", pa.string()),  # add | remove
        ("sample_id", pa.string()),
        ("source", TEXT),  # as the manifest gave it
        ("path", TEXT),  # where it was found
        ("source_digest", pa.string()),
        ("size", pa.int64()),  # with mtime_ns: says when to read the file again, never what it is
        ("mtime_ns", pa.int64()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("clip", pa.int64()),  # which of the clips of the row, from 0
        ("clips", pa.int64()),  # how many it makes; 0 where the file could not be looked at
        ("caption", TEXT),
        ("caption_digest", pa.string()),
        ("unit", pa.int64()),
        ("prompt_unit", pa.int64()),
        ("extra", TEXT),  # other columns of the manifest row, as JSON
    ]
)
"""Columns of a manifest generation: the rows asked for, append-only."""

KEY: dict[Family, str] = {"latents": "sample_id", "prompts": "caption_digest"}
UNIT: dict[Family, str] = {"latents": "unit", "prompts": "prompt_unit"}
ROW = ("path", "start_s", "end_s", "clip", "caption")
"""What makes two rows the same row asked for."""
_PLACE = ("path", "start_s", "end_s", "clip")


def row_keys(table: pa.Table, *, caption: bool = True) -> pa.ChunkedArray:
    """One string per row that is equal for equal rows; without `caption`, for equal clips of equal paths."""
    columns = [pc.cast(table[name], TEXT) for name in (ROW if caption else _PLACE)]
    # No path holds a NUL character, and nothing else can hold one.
    return pc.binary_join_element_wise(*columns, pa.scalar("\0", TEXT), null_handling="replace")


def positions(values: pa.ChunkedArray, *, among: pa.ChunkedArray) -> np.ndarray:
    """[n] of the first equal entry of `among` for each value; -1 where there is none."""
    return pc.fill_null(pc.index_in(values, value_set=among), -1).to_numpy()


def column_numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column without nulls as a numpy array."""
    return table[name].to_numpy()


@dataclass(frozen=True)
class Held:
    """Every key of a family, by unit and position in the unit; parallel arrays."""

    unit: np.ndarray
    row: np.ndarray
    """The entry of the history that stands for the key: a live one where there is one."""
    live: np.ndarray
    """Whether a live row asks for it."""
    old: np.ndarray
    """Whether it was in another unit before: it is tried again."""


class History:
    """All generations of a dataset, read once."""

    def __init__(self, table: pa.Table, *, generations: int) -> None:
        """`table`: the entries of all `generations`, in order."""
        self.table, self.generations = table.combine_chunks(), generations
        self._codes = {family: codes_of(table[name]) for family, name in KEY.items()}
        self._added = pc.equal(table["op"], "add").to_numpy()
        rows = codes_of(row_keys(table))
        newest = _last(rows, np.arange(len(rows)))
        first = _last(rows[::-1], np.arange(len(rows))[::-1])
        self.live = newest[self._added[newest]]
        """Numbers of the entries that are live: by unit, then as the unit holds them, then as they were
        first asked for. What is added or touched later never changes that order."""
        held, codes = self.held("latents"), self._codes["latents"]
        place = np.empty(len(held.row), np.int64)
        place[codes[held.row]] = np.arange(len(held.row))
        self.live = self.live[np.lexsort((first[rows[self.live]], place[codes[self.live]]))]

    def with_generation(self, table: pa.Table) -> History:
        """The history with one generation more, where that holds anything."""
        if not table.num_rows:
            return self
        return History(pa.concat_tables([self.table, table]), generations=self.generations + 1)

    def live_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The live rows, by unit and position in the unit."""
        table = self.table if columns is None else self.table.select(columns)
        return table.take(self.live)

    def held(self, family: Family) -> Held:
        """Every key ever asked for, with the unit it belongs to."""
        codes, units = self._codes[family], column_numbers(self.table, UNIT[family])
        added = np.flatnonzero(self._added)
        row = _last(codes[added], added)
        row[codes[self.live]] = self.live
        live = np.zeros(len(row), bool)
        live[codes[self.live]] = True
        unit = units[row]
        here = units[added] == unit[codes[added]]
        old = np.zeros(len(row), bool)
        old[codes[added[~here]]] = True
        first = _last(codes[added[here]][::-1], added[here][::-1])
        order = np.lexsort((first, unit))
        return Held(unit=unit[order], row=row[order], live=live[order], old=old[order])

    def once_hidden(self, family: Family) -> pa.ChunkedArray:
        """Keys, each as often as there are such entries, of the entries that are live no more: only these may
        have been asked for by no row when their unit ran."""
        hidden = np.ones(self.table.num_rows, bool)
        hidden[self.live] = False
        return self.table[KEY[family]].filter(pa.array(hidden))

    def earlier_units(self) -> dict[str, list[int]]:
        """sample_id -> the units it was in before the one it belongs to; only of samples that moved."""
        codes, units = self._codes["latents"], column_numbers(self.table, "unit")
        held = self.held("latents")
        now = np.empty(len(held.unit), np.int64)
        now[codes[held.row]] = held.unit
        entries = np.flatnonzero(self._added & (units != now[codes]))
        moved: dict[str, set[int]] = {}
        for row in self.table.select(["sample_id", "unit"]).take(entries).to_pylist():
            moved.setdefault(row["sample_id"], set()).add(row["unit"])
        return {key: sorted(earlier) for key, earlier in moved.items()}

    def next_unit(self, family: Family) -> int:
        """The first unit number that no entry names, nor the empty prompt has."""
        first = EMPTY_PROMPT_UNIT if family == "prompts" else -1
        return int(column_numbers(self.table, UNIT[family]).max(initial=first)) + 1


def codes_of(values: pa.ChunkedArray) -> np.ndarray:
    """Numbers from 0, equal for equal values, in order of first appearance."""
    chunks = values.dictionary_encode().chunks
    return np.concatenate([np.empty(0, np.int32), *(chunk.indices.to_numpy() for chunk in chunks)])


def _last(codes: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """code -> the last of its entries, where every code has one."""
    found = np.zeros(int(codes.max(initial=-1)) + 1, np.int64)
    found[codes] = entries  # of several assignments numpy keeps the last
    return found
