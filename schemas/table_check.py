"""`index.parquet` and `quarantine.parquet` held against the commit records they are made of.

In: a dataset. Out: what is wrong with its tables. They are made again from commit records, block by block,
and compared with what is stored, of which nothing is taken over: memory is a block of each and, as columns,
what rows share of their captions. The trade-off: every commit record is read a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.card import Card
from schemas.dataset import Dataset
from schemas.errors import DatasetError
from schemas.history import UNIT, History, column_numbers
from schemas.index import QUARANTINE_SCHEMA, index_schema
from schemas.resolve import CommitReader
from schemas.tables import open_sealed

_BLOCK_ROWS = 2048
Row = dict[str, Any]
TableProblem = tuple[Path, str | None, str]
"""(file, sample_id of the first row concerned, what is wrong)."""


def table_problems(
    dataset: Dataset, card: Card, history: History, *, compare: bool
) -> Iterator[TableProblem]:
    """What is wrong with both tables: the first difference of each from the commit records, with `compare`;
    without it (the dataset is unfinished) only that they can be read and name no unit that is not done."""
    stored = {}
    for path, schema in (
        (dataset.index_path, index_schema(card)),
        (dataset.quarantine_path, QUARANTINE_SCHEMA),
    ):
        try:
            stored[path] = _Rows(open_sealed(path, remedy="it can be made again"), schema)
        except FileNotFoundError:
            if compare:
                yield path, None, "is missing"
        except DatasetError as error:
            yield path, None, str(error)
    if dataset.index_path in stored:
        undone = list(_undone(dataset, stored[dataset.index_path]))
        yield from undone
        compare = compare and not undone
    if compare:
        yield from _differences(dataset, card, history, stored)


class _Rows:
    """The rows of a stored table, a few at a time."""

    def __init__(self, file: pq.ParquetFile, schema: pa.Schema) -> None:
        if not file.schema_arrow.equals(schema):
            raise DatasetError("has other columns than this version writes")
        self.file = file
        self._batches = file.iter_batches(batch_size=_BLOCK_ROWS)
        self._rest = schema.empty_table()

    def next(self, count: int) -> pa.Table:
        """The next `count` rows, or those that are left."""
        while self._rest.num_rows < count and (batch := next(self._batches, None)) is not None:
            self._rest = pa.concat_tables([self._rest, pa.Table.from_batches([batch], self._rest.schema)])
        rows, self._rest = self._rest.slice(0, count), self._rest.slice(count)
        return rows


def _undone(dataset: Dataset, index: _Rows) -> Iterator[TableProblem]:
    """One problem for every unit that the index names and that has no commit record."""
    rows, done = index.file.read(columns=["sample_id", *UNIT.values()]), dataset.finished()
    for family in UNIT:
        units = column_numbers(rows, UNIT[family])
        undone = np.flatnonzero(~np.isin(units, done[family]))
        for first in undone[np.unique(units[undone], return_index=True)[1]].tolist():
            sample = rows["sample_id"][first].as_py()
            yield dataset.index_path, sample, f"{UNIT[family]} {units[first]} has no commit record"


def _differences(
    dataset: Dataset, card: Card, history: History, stored: dict[Path, _Rows]
) -> Iterator[TableProblem]:
    reader = CommitReader(dataset, card, history, rows=history.live)
    for start in range(0, len(history.live), _BLOCK_ROWS):
        made = reader.read(history.live[start:][:_BLOCK_ROWS])
        for path, expected in ((dataset.index_path, made.index), (dataset.quarantine_path, made.quarantine)):
            if path in stored:
                found = stored[path].next(expected.num_rows)
                if not found.equals(expected):
                    del stored[path]
                    yield path, *_first_difference(found.to_pylist(), expected.to_pylist())
    for path, rows in stored.items():
        if surplus := rows.next(1).to_pylist():
            yield path, surplus[0]["sample_id"], "is in it, and no commit record gives this row"


def _first_difference(found: list[Row], expected: list[Row]) -> tuple[str, str]:
    """(sample_id, what differs) of the first row in which `found` is not what commit records give."""
    for have, want in zip(found, expected, strict=False):
        if have != want:
            names = [name for name in want if have[name] != want[name]]
            return want["sample_id"], f"{', '.join(names)} differ from the commit records"
    return expected[len(found)]["sample_id"], "is not in it"
