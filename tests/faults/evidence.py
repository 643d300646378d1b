"""What a dataset folder shows after a fault: torn, lost, doubled, different, or left behind.

In: the folder, and what an undisturbed run made. Out: sentences, none where nothing went wrong. Commit
records are compared without `seconds`, which differ between any two runs, and without `attempts`, which
count how often a decoder was killed.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.check import check_dataset
from schemas.errors import LatentpressError
from schemas.index import read_index, read_quarantine
from schemas.load import open_sealed_json

TABLES = ("index.parquet", "quarantine.parquet", "summary.json")
"""Rebuilt by every run; all other files with a final name, but the log of a run, are there for good."""


def files(root: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def records(root: Path) -> dict[str, dict[str, Any]]:
    """Commit record by file name, without what may differ between runs."""
    found = {}
    for path in sorted((root / "commits").rglob("*.json")):
        record = open_sealed_json(path.read_bytes())
        del record["seconds"]
        for failure in record["quarantined"]:
            del failure["attempts"]
        found[path.name] = record
    return found


def torn(root: Path) -> Iterator[str]:
    """Files whose final name promises more than they hold, at any moment of a run."""
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.name.startswith("."):  # temp files promise nothing
            continue
        try:
            _require_whole(root, path)
        except (OSError, ValueError, KeyError, pa.ArrowException, LatentpressError) as error:
            yield f"torn: {path.relative_to(root)}: {error}"


def _require_whole(root: Path, path: Path) -> None:
    data = path.read_bytes()
    if path.suffix == ".tar":
        if hashlib.sha256(data).hexdigest()[:12] != path.stem.rpartition("-")[2]:
            raise ValueError("is not named by its content")
    elif path.suffix == ".parquet":
        pq.read_table(path, page_checksum_verification=True)
    elif path.name == "log.jsonl":  # grows by lines; the one file that may end in the middle of one
        for line in data.splitlines()[:-1]:
            json.loads(line)
    elif path.suffix == ".toml":
        tomllib.loads(data.decode())
    elif path.name == "summary.json":
        json.loads(data)
    elif path.name == "card.json":
        open_sealed_json(data)
    elif path.suffix == ".json" and path.is_relative_to(root / "commits"):
        record = open_sealed_json(data)
        if record["shard"] is not None:
            shard = (root / record["shard"]).read_bytes()
            if (len(shard), hashlib.sha256(shard).hexdigest()) != (record["nbytes"], record["sha256"]):
                raise ValueError(f"{record['shard']} is not what the record says")
    else:
        raise ValueError("is no file of a dataset")


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run of a job left."""

    records: dict[str, dict[str, Any]]
    index: pa.Table
    quarantine: list[dict[str, Any]]

    @classmethod
    def of(cls, root: Path) -> Reference:
        quarantine = read_quarantine(root).to_pylist()
        for row in quarantine:
            del row["attempts"]
        return cls(records(root), read_index(root), quarantine)

    def differences(self, root: Path) -> Iterator[str]:
        """How a finished dataset is not what the undisturbed run made."""
        yield from torn(root)
        found = records(root)
        keys, wanted = _keys(found), _keys(self.records)
        yield from (f"lost: {key}" for key in wanted - keys)
        yield from (f"doubled: {key}" for key, count in keys.items() if count > wanted[key])
        for name in sorted(found.keys() | self.records.keys()):
            if found.get(name) != self.records.get(name):
                yield f"different: commits/{name}"
        now = Reference.of(root)
        rows = Counter(now.index["sample_id"].to_pylist())
        wanted_rows = Counter(self.index["sample_id"].to_pylist())
        yield from (f"lost: index row {key}" for key in wanted_rows - rows)
        yield from (f"doubled: index row {key}" for key in rows - wanted_rows)
        if not now.index.equals(self.index):
            yield "different: index.parquet"
        if now.quarantine != self.quarantine:
            yield "different: quarantine.parquet"
        verdict = check_dataset(root)
        yield from (f"different: verify says {finding}" for finding in verdict.findings)
        if verdict.unfinished:
            yield f"lost: {verdict.unfinished} units are not done"


def _keys(found: dict[str, dict[str, Any]]) -> Counter[str]:
    return Counter(
        each["key"] for record in found.values() for each in (*record["samples"], *record["quarantined"])
    )


def orphans(root: Path) -> set[str]:
    """Files that no commit record names: temp files, and shards of writers that died or lost."""
    named = {record["shard"] for record in records(root).values()}
    return {
        name
        for name in files(root)
        if Path(name).name.startswith(".") or (name.endswith(".tar") and name not in named)
    }


def removed(before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    """What a run took away or changed of what was there before it: nothing may be."""
    for name, sha256 in before.items():
        if name not in after:
            yield f"lost: {name} was deleted"
        elif after[name] != sha256 and name not in TABLES and not name.endswith("log.jsonl"):
            yield f"different: {name} was changed"
