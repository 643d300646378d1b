"""`index.parquet` and `quarantine.parquet`, brought up to date: rows that still hold are copied, only new
commit records are read.

In: the tables as they are, the live rows, the list of finished units. Out: the tables as they would be if
made from commit records alone. The old tables are sealed and name their dataset, so they are trusted. Nothing
is written where nothing changed; else the index is copied row group by row group, so memory holds a block
of it and the columns that rows are told apart by.
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
from schemas.history import ROW, History, column_numbers, positions, row_keys
from schemas.index import QUARANTINE_SCHEMA, index_schema, read_index, read_quarantine
from schemas.resolve import BLOCK_ROWS, CommitReader
from schemas.sample import Family
from schemas.tables import SealedWriter, open_sealed, read_sealed, seal_of, sealed_parquet

_HELD = ("sample_id", "unit", "source")
_INDEX_HELD = (*_HELD, "prompt_unit", "extra")
_DATASET = b"latentpress.dataset"
"""In the metadata of both tables: the seal of the dataset's first generation."""
_ROUNDS = 3
"""Most that the tables are made in one call, while another driver works on."""


@dataclass(frozen=True)
class TableCounts:
    """What the tables hold."""

    kept: int
    quarantined: int
    reasons: Counter[str]
    buckets: Counter[str]
    num_tokens: int


def update_tables(dataset: Dataset, card: Card, history: History | None = None) -> TableCounts:
    """Write both tables where they differ from what is committed and asked for; what they hold then.

    Another driver may have written newer ones while these were made; its commits and generations were there
    before, so they are looked at once more, a few times where it is still at work.
    """
    history = history or dataset.history()
    for _ in range(_ROUNDS):
        finished = dataset.finished()
        if not _write_tables(dataset, card, history, finished):
            break
        seen, history = history, dataset.history(history)
        now = dataset.finished()
        if history is seen and all(np.array_equal(now[family], finished[family]) for family in now):
            break
    return _counts(dataset)


def _write_tables(dataset: Dataset, card: Card, history: History, finished: dict[Family, np.ndarray]) -> bool:
    """Whether there was anything to write."""
    live = history.live_table([*ROW, *_INDEX_HELD])
    latents_done = np.isin(column_numbers(live, "unit"), finished["latents"])
    prompts_done = np.isin(column_numbers(live, "prompt_unit"), finished["prompts"])

    # Of a dataset of the same rows the index would fit line by line, and name other shards.
    seal = seal_of(dataset.generation_path(0)) if history.generations else ""
    schema, failed_schema = (
        schema.with_metadata({_DATASET: seal}) for schema in (index_schema(card), QUARANTINE_SCHEMA)
    )
    index = _OldIndex(dataset.index_path, schema)
    old = _old_table(dataset.quarantine_path, failed_schema)
    failures = failed_schema.empty_table() if old is None else old
    indexed = np.where(latents_done & prompts_done, _places(live, index.rows, _INDEX_HELD), -1)
    failed = np.where(latents_done, _places(live, failures, _HELD), -1)
    todo = latents_done & (indexed < 0) & (failed < 0)

    new, wrote = (QUARANTINE_SCHEMA.empty_table(), np.empty(0, np.int64)), False
    if index.missing or todo.any() or (indexed >= 0).sum() < index.rows.num_rows:
        reader = CommitReader(dataset, card, history, rows=history.live[todo])
        new = _write_index(
            dataset.index_path, index, indexed, schema, reader=reader, live=history.live, todo=todo
        )
        wrote = True
    copied = np.flatnonzero(failed >= 0)
    if old is None or len(new[1]) or len(copied) < failures.num_rows:
        table = pa.concat_tables([failed_schema.empty_table(), failures.take(failed[copied]), new[0]])
        order = np.argsort(np.concatenate([copied, new[1]]))
        replace(dataset.quarantine_path, sealed_parquet(table.take(order)))
        wrote = True
    return wrote


class _OldIndex:
    """The index as it is; without rows where there is none that can be used."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        columns = [*ROW, *_INDEX_HELD]
        try:
            self._file = open_sealed(path, remedy="")
            self.missing = not _is_ours(self._file.schema_arrow, schema)
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


def _old_table(path: Path, schema: pa.Schema) -> pa.Table | None:
    """A table that can be made again; None where there is none that can be used."""
    try:
        table = read_sealed(path, remedy="")
    except (FileNotFoundError, DatasetError):
        return None
    return table if _is_ours(table.schema, schema) else None


def _is_ours(found: pa.Schema, schema: pa.Schema) -> bool:
    """Whether a table has these columns and is of this dataset."""
    return found.equals(schema) and (found.metadata or {}).get(_DATASET) == schema.metadata[_DATASET]


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
    schema: pa.Schema,
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
            with SealedWriter(file, schema) as writer:
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
