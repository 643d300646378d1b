"""`index.parquet` and `quarantine.parquet`, brought up to date: rows that still hold are copied, only new
commit records are read.

In: the tables as they are, the live rows, the list of finished units. Out: the tables as they would be if
made from commit records alone. The old tables are sealed, so their bytes are trusted. Nothing is written
where nothing changed; else the index is copied row group by row group, so memory holds a block of it
and the columns that rows are told apart by.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import publish, replace, temp_path
from schemas.card import Card
from schemas.dataset import Dataset
from schemas.errors import DatasetError
from schemas.history import History, column_numbers, positions, row_keys
from schemas.index import QUARANTINE_SCHEMA, index_schema, read_index, read_quarantine
from schemas.resolve import BLOCK_ROWS, CommitReader
from schemas.tables import SealedWriter, open_sealed, read_sealed, sealed_parquet

_KEY = ("path", "start_s", "end_s", "clip", "caption")
_HELD = ("sample_id", "unit", "source")
_INDEX_HELD = (*_HELD, "prompt_unit", "extra")


@dataclass(frozen=True)
class TableCounts:
    """What the tables hold."""

    kept: int
    quarantined: int
    reasons: Counter[str]
    buckets: Counter[str]
    num_tokens: int


def update_tables(dataset: Dataset, card: Card, history: History | None = None) -> TableCounts:
    """Write both tables where they differ from what is committed and asked for; what they hold then."""
    history = history or dataset.history()
    finished = dataset.finished()
    live = history.live_table([*_KEY, *_INDEX_HELD])
    latents_done = np.isin(column_numbers(live, "unit"), finished["latents"])
    prompts_done = np.isin(column_numbers(live, "prompt_unit"), finished["prompts"])

    index = _OldIndex(dataset.index_path, index_schema(card))
    failures = _old_table(dataset.quarantine_path, QUARANTINE_SCHEMA)
    indexed = np.where(latents_done & prompts_done, _places(live, index.rows, _INDEX_HELD), -1)
    failed = np.where(latents_done, _places(live, failures, _HELD), -1)
    todo = latents_done & (indexed < 0) & (failed < 0)

    new = QUARANTINE_SCHEMA.empty_table(), np.empty(0, np.int64)
    if index.missing or todo.any() or (indexed >= 0).sum() < index.rows.num_rows:
        reader = CommitReader(dataset, card, history, rows=history.live[todo])
        new = _write_index(dataset.index_path, index, indexed, reader=reader, live=history.live, todo=todo)
    copied = np.flatnonzero(failed >= 0)
    if not dataset.quarantine_path.exists() or len(new[1]) or len(copied) < failures.num_rows:
        table = pa.concat_tables([failures.take(failed[copied]), new[0]])
        order = np.argsort(np.concatenate([copied, new[1]]))
        replace(dataset.quarantine_path, sealed_parquet(table.take(order)))
    return _counts(dataset)


class _OldIndex:
    """The index as it is; without rows where there is none that can be used."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        columns = [*_KEY, *_INDEX_HELD]
        try:
            self._file = open_sealed(path, remedy="")
            self.missing = not self._file.schema_arrow.equals(schema)
        except (FileNotFoundError, DatasetError):
            self.missing = True
        self.rows = schema.empty_table() if self.missing else self._file.read(columns=columns)
        if not self.missing:
            groups = range(self._file.num_row_groups)
            sizes = [self._file.metadata.row_group(group).num_rows for group in groups]
            self._starts = np.cumsum([0, *sizes])
        self._last: tuple[int, pa.Table] = (-1, None)

    def take(self, rows: np.ndarray) -> list[pa.Table]:
        """The whole rows of these numbers, ascending; a row group is read once."""
        groups = np.searchsorted(self._starts, rows, "right") - 1
        return [self._group(g).take(rows[groups == g] - self._starts[g]) for g in np.unique(groups).tolist()]

    def _group(self, group: int) -> pa.Table:
        if self._last[0] != group:
            self._last = (group, self._file.read_row_group(group))
        return self._last[1]


def _old_table(path: Path, schema: pa.Schema) -> pa.Table:
    """A table that can be made again; empty where there is none that can be used."""
    try:
        table = read_sealed(path, remedy="")
    except (FileNotFoundError, DatasetError):
        return schema.empty_table()
    return table if table.schema.equals(schema) else schema.empty_table()


def _places(live: pa.Table, old: pa.Table, held: Sequence[str]) -> np.ndarray:
    """[live.num_rows] the old row that is the same in key and `held`; -1 where there is none."""
    if not old.num_rows:
        return np.full(live.num_rows, -1)
    found = positions(row_keys(live), among=row_keys(old))
    there = old.select(held).take(np.maximum(found, 0))
    for name in held:
        found = np.where(pc.equal(live[name], there[name]).to_numpy(), found, -1)
    return found


def _write_index(
    path: Path,
    old: _OldIndex,
    indexed: np.ndarray,
    *,
    reader: CommitReader,
    live: np.ndarray,
    todo: np.ndarray,
) -> tuple[pa.Table, np.ndarray]:
    """Write the index anew, row group by row group; the rows of `todo` that failed, and which these are."""
    failures, failed = [QUARANTINE_SCHEMA.empty_table()], [np.empty(0, np.int64)]
    temp = temp_path(path.parent)
    try:
        with temp.open("x+b") as file:
            with SealedWriter(file, reader.schema) as writer:
                for start in range(0, len(live), BLOCK_ROWS):
                    block = np.arange(start, min(start + BLOCK_ROWS, len(live)))
                    copied, fresh = block[indexed[block] >= 0], block[todo[block]]
                    new = reader.read(live[fresh])
                    failures.append(new.quarantine)
                    failed.append(fresh[new.failed])
                    parts = [*old.take(indexed[copied]), new.index] if len(copied) else [new.index]
                    order = np.argsort(np.concatenate([copied, fresh[new.kept]]))
                    writer.write(pa.concat_tables(parts).take(order))
            file.flush()
            os.fsync(file.fileno())
        publish(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    return pa.concat_tables(failures), np.concatenate(failed)


def _counts(dataset: Dataset) -> TableCounts:
    index = read_index(dataset.root, columns=["bucket", "num_tokens"])
    reasons = read_quarantine(dataset.root)["reason"]
    return TableCounts(
        kept=index.num_rows,
        quarantined=len(reasons),
        reasons=_counted(reasons),
        buckets=_counted(index["bucket"]),
        num_tokens=pc.sum(index["num_tokens"]).as_py() or 0,
    )


def _counted(values: pa.ChunkedArray) -> Counter[str]:
    return Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(values).to_pylist()})
