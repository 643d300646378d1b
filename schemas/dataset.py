"""The folder of a latent dataset: where each file lies, and what is committed or asked for.

Readers follow commit records, never listings of shards. Nothing here writes; `pipeline.commit` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import DatasetError
from schemas.load import open_sealed_json
from schemas.sample import Family, UnitCommit, unit_folder, unit_name

GENERATION_SCHEMA = pa.schema(
    [
        ("op", pa.string()),  # add | remove
        ("sample_id", pa.string()),
        ("source", pa.string()),  # as the manifest gave it
        ("path", pa.string()),  # where it was found
        ("source_digest", pa.string()),
        ("size", pa.int64()),  # with mtime_ns: says when to read the file again, never what it is
        ("mtime_ns", pa.int64()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("clip", pa.int64()),  # which of the clips of the row, from 0
        ("clips", pa.int64()),  # how many it makes; 0 where the file could not be looked at
        ("caption", pa.string()),
        ("caption_digest", pa.string()),
        ("unit", pa.int64()),
        ("prompt_unit", pa.int64()),
        ("extra", pa.string()),  # other columns of the manifest row, as JSON
    ]
)
"""Columns of a manifest generation: the rows asked for, append-only."""

GenerationRow = dict[str, Any]


def generation_key(row: GenerationRow) -> tuple[Any, ...]:
    """What makes two rows of the generations the same row asked for."""
    return (row["path"], row["start_s"], row["end_s"], row["caption"], row["clip"])


class Dataset:
    """Paths and committed state of one dataset folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.index_path = self.root / "index.parquet"
        self.quarantine_path = self.root / "quarantine.parquet"
        self.summary_path = self.root / "summary.json"
        self.runs = self.root / "runs"

    def generation_path(self, generation: int) -> Path:
        return self.root / "manifest" / f"{generation:06d}.parquet"

    def shard_folder(self, family: Family, unit: int) -> Path:
        return self.root / family / unit_folder(unit)

    def commit_path(self, family: Family, unit: int) -> Path:
        return self.root / "commits" / unit_folder(unit) / f"{unit_name(family, unit)}.json"

    def generations(self) -> list[pa.Table]:
        """Every manifest generation in order."""
        tables: list[pa.Table] = []
        while (path := self.generation_path(len(tables))).exists():
            try:
                table = pq.read_table(path, page_checksum_verification=True)
            except (pa.ArrowException, OSError) as error:
                raise DatasetError(f"{path} cannot be read: {error}") from error
            if table.schema.names != GENERATION_SCHEMA.names:
                raise DatasetError(
                    f"{path}: expected the columns {GENERATION_SCHEMA.names}, found {table.schema.names}"
                )
            tables.append(table)
        return tables

    def live_rows(self, generations: Sequence[pa.Table] | None = None) -> list[GenerationRow]:
        """Rows added and not removed since, in the order they were first asked for.

        `generations` are all of them where the caller has read them already.
        """
        live: dict[tuple[Any, ...], GenerationRow] = {}
        for table in self.generations() if generations is None else generations:
            for row in table.to_pylist():
                if row["op"] == "add":
                    live[generation_key(row)] = row
                else:
                    live.pop(generation_key(row), None)
        return list(live.values())

    def commit(self, family: Family, unit: int) -> UnitCommit | None:
        """The commit record of a unit; None where it is not done."""
        path = self.commit_path(family, unit)
        try:
            return UnitCommit.model_validate_json(json.dumps(open_sealed_json(path.read_bytes())))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"commit record {path} is damaged: {error}; delete it and run preprocess again"
            ) from error

    def commits(self, family: Family, units: set[int]) -> Iterator[UnitCommit]:
        """The commit records there are for `units`, by number."""
        for unit in sorted(units):
            if commit := self.commit(family, unit):
                yield commit


def planned_units(rows: list[GenerationRow], family: Family) -> set[int]:
    """Units that hold at least one of `rows`."""
    return {row["unit" if family == "latents" else "prompt_unit"] for row in rows}
