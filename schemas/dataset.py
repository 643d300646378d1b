"""The folder of a latent dataset: where each file lies, and what is committed or asked for.

Readers follow commit records, never listings of shards. Nothing here writes; `pipeline.commit` does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from schemas.errors import DatasetError
from schemas.history import GENERATION_SCHEMA, History
from schemas.load import open_sealed_json
from schemas.patience import read_bytes
from schemas.sample import Family, UnitCommit, unit_folder, unit_name
from schemas.store import is_remote, location
from schemas.tables import read_sealed

_RECORD = re.compile(r"([ut])(\d{8,})\.json")


class Dataset:
    """Paths and committed state of one dataset folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = location(root)
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

    def history(self, since: History | None = None) -> History:
        """Every manifest generation; only those after `since`, where that was read before, are read."""
        first = since.generations if since else 0
        tables = [since.table if since else GENERATION_SCHEMA.empty_table()]
        while (path := self.generation_path(first + len(tables) - 1)).exists():
            table = read_sealed(path, remedy="put back a copy of it: it alone says what was asked for")
            if table.schema.names != GENERATION_SCHEMA.names:
                raise DatasetError(
                    f"{path}: expected the columns {GENERATION_SCHEMA.names}, found {table.schema.names}"
                )
            tables.append(table)
        if since and len(tables) == 1:
            return since
        return History(pa.concat_tables(tables), generations=first + len(tables) - 1)

    def finished(self) -> dict[Family, np.ndarray]:
        """The units that have a commit record, from one listing of the folders of these; ascending."""
        units: dict[str, list[int]] = {"u": [], "t": []}
        commits = self.root / "commits"
        for folder in commits.iterdir() if commits.exists() else ():
            for name in _names(folder):
                if match := _RECORD.fullmatch(name):
                    units[match[1]].append(int(match[2]))
        return {
            "latents": np.array(sorted(units["u"]), np.int64),
            "prompts": np.array(sorted(units["t"]), np.int64),
        }

    def commit(self, family: Family, unit: int) -> UnitCommit | None:
        """The commit record of a unit; None where it is not done."""
        path = self.commit_path(family, unit)
        try:
            return UnitCommit.model_validate_json(json.dumps(open_sealed_json(read_bytes(path))))
        except FileNotFoundError:
            return None
        except OSError as error:  # which says nothing about the record: it is not to be deleted
            raise DatasetError(f"commit record {path} cannot be read: {error}") from error
        except ValueError as error:
            raise DatasetError(
                f"commit record {path} is damaged: {error}; delete it and run preprocess again"
            ) from error

    def commits(self, family: Family, units: Iterable[int]) -> Iterator[UnitCommit]:
        """The commit records there are for `units`, in their order."""
        for unit in units:
            if commit := self.commit(family, unit):
                yield commit


def _names(folder: Path) -> Iterable[str]:
    """Names of the files in `folder`; without an object per file where that takes long."""
    return (path.name for path in folder.iterdir()) if is_remote(folder) else os.listdir(folder)
