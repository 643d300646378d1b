"""What killed runs left behind in a dataset: found, listed, removed. Nothing else removes anything.

In: a dataset and an age. Out: orphans: shards that the commit record of their unit does not name, temp
files, and uploads to an object store that were begun and never finished. A name that is none of these is
left alone. Each shard is held against the record of its unit, read by its own path, so a listing that
misses something cannot cost a shard. Trade-off: one read per unit that is old enough.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import object_store
from pipeline.commit import LOCAL_TEMP_PREFIX, NO_LINKS, TEMP_PREFIX, sync_folder
from schemas.card import read_card
from schemas.dataset import Dataset
from schemas.errors import DatasetError
from schemas.index import read_index
from schemas.patience import patiently
from schemas.sample import Family, unit_name
from schemas.store import is_remote

_FAMILIES: tuple[Family, ...] = ("prompts", "latents")
_SHARD = re.compile(r"[ut](\d{8,})-[0-9a-f]{12}\.tar")
_READERS = 8
_SHARD_ORPHAN = "shard that no commit names"
_TEMP_ORPHAN = "temp file of a run that ended"
_UPLOAD_ORPHAN = "upload that was never finished"


@dataclass(frozen=True)
class Orphan:
    """One thing that nothing needs."""

    name: str
    """Relative to the dataset; a whole path where it lies in this machine's $TMPDIR."""
    kind: str
    nbytes: int
    age_s: float
    upload: str | None = None
    """Id of an unfinished upload."""
    unit: tuple[Family, int] | None = None
    """Of a shard."""


@dataclass(frozen=True)
class _Entry:
    path: Path
    nbytes: int
    changed: float
    """Unix time of the last change, by the clock of the store."""
    is_folder: bool


def find_orphans(dataset: Dataset, *, older_than_s: float) -> list[Orphan]:
    """Everything that no commit and no run of the last `older_than_s` seconds needs.

    DatasetError where what is found cannot be judged: no card, an index that names shards whose commit
    records are gone, a damaged record.
    """
    read_card(dataset.root)  # else any folder of tars would look like one of orphans
    now = time.time()
    temps, shards = [], []
    for entry in _entries(dataset):
        age_s = now - entry.changed
        if age_s < older_than_s:
            continue
        name = entry.path.relative_to(dataset.root).as_posix()
        if entry.path.name.startswith(TEMP_PREFIX):
            temps.append(Orphan(name, _TEMP_ORPHAN, entry.nbytes, age_s))
        elif not entry.is_folder and (unit := _unit_of(dataset, entry.path)):
            shards.append(Orphan(name, _SHARD_ORPHAN, entry.nbytes, age_s, unit=unit))
    with ThreadPoolExecutor(_READERS) as pool:
        needed = pool.map(lambda orphan: _is_named(dataset, orphan), shards)
        orphans = [orphan for orphan, is_needed in zip(shards, needed, strict=True) if not is_needed]
    _require_not_indexed(dataset, orphans)
    outside = [*_unfinished_uploads(dataset), *_local_temps()] if is_remote(dataset.root) else []
    return [*temps, *orphans, *(orphan for orphan in outside if orphan.age_s >= older_than_s)]


def remove(dataset: Dataset, orphan: Orphan) -> bool:
    """Remove one orphan; False where it is gone, changed since it was found, or needed by now.

    A run that makes an uncommitted unit again gives its shard the same name. So the record of the unit is
    looked at once more, and the file: it is published first, so it is young where a record is to come. In a
    folder both are looked at again once the shard is out of everybody's way, and it goes back if need be;
    an object store has no such step, and a run that publishes between look and removal loses its shard.
    """
    try:
        return _remove(dataset, orphan)
    except FileNotFoundError:
        return False


def _remove(dataset: Dataset, orphan: Orphan) -> bool:
    if orphan.upload is not None:
        fs, key = object_store.handle(dataset.root / orphan.name)
        bucket, _, name = key.partition("/")
        patiently(
            dataset.root,
            lambda: fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=name, UploadId=orphan.upload),
        )
        return True
    path = dataset.root / orphan.name if not os.path.isabs(orphan.name) else Path(orphan.name)
    if orphan.unit is not None and _is_named(dataset, orphan):
        return False
    found = path.stat() if is_remote(path) else path.lstat()
    if time.time() - found.st_mtime < orphan.age_s:
        return False
    if is_remote(path):
        object_store.delete(path)
    elif orphan.unit is not None:
        return _remove_shard(dataset, orphan, path)
    elif stat.S_ISDIR(found.st_mode):
        shutil.rmtree(path)
    else:
        path.unlink()
    return True


def _remove_shard(dataset: Dataset, orphan: Orphan, path: Path) -> bool:
    """Take a shard aside, look at what was taken, and remove it or put it back."""
    aside = path.with_name(f"{TEMP_PREFIX}gc-{secrets.token_hex(6)}")
    os.rename(path, aside)
    is_needed = True
    try:
        is_young = time.time() - aside.lstat().st_mtime < orphan.age_s
        is_needed = is_young or _is_named(dataset, orphan)
    finally:
        if is_needed:
            _put_back(aside, path)
        aside.unlink(missing_ok=True)
    return not is_needed


def _put_back(aside: Path, path: Path) -> None:
    """Give a shard its name again, durably; one that was published there meanwhile stays."""
    try:
        os.link(aside, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if path.exists():
            return
        os.rename(aside, path)
    sync_folder(path.parent)


def _entries(dataset: Dataset) -> Iterator[_Entry]:
    """What lies where a run may leave something, and shards."""
    root = dataset.root
    for folder in (root, root / "manifest"):
        yield from _listed(folder)
    for parent in (root / "commits", dataset.runs, *(root / family for family in _FAMILIES)):
        for entry in list(_listed(parent)):
            yield entry
            if entry.is_folder:
                yield from _listed(entry.path)


def _listed(folder: Path) -> Iterator[_Entry]:
    """The entries of one folder; none where there is no such folder."""
    if not is_remote(folder):
        if folder.is_dir():
            for path in folder.iterdir():
                try:
                    found = path.lstat()
                except FileNotFoundError:
                    continue  # a run at work gave it its final name
                yield _Entry(path, found.st_size, found.st_mtime, stat.S_ISDIR(found.st_mode))
        return
    fs, key = object_store.handle(folder)
    try:
        found = patiently(folder, lambda: fs.ls(key, detail=True, refresh=True))
    except FileNotFoundError:
        return
    for entry in found:
        name = entry["name"].rstrip("/").rpartition("/")[2]
        is_folder = entry["type"] == "directory"
        changed = time.time() if is_folder else entry["LastModified"].timestamp()
        yield _Entry(folder / name, entry["size"] or 0, changed, is_folder)


def _unit_of(dataset: Dataset, path: Path) -> tuple[Family, int] | None:
    """The unit whose shard lies at `path`, by its name and place; None where it is no shard of ours."""
    if match := _SHARD.fullmatch(path.name):
        unit = int(match[1])
        for family in _FAMILIES:
            if path.parent == dataset.shard_folder(family, unit) and path.name.startswith(
                f"{unit_name(family, unit)}-"
            ):
                return family, unit
    return None


def _is_named(dataset: Dataset, orphan: Orphan) -> bool:
    if orphan.unit is None:
        return False
    family, unit = orphan.unit
    commit = dataset.commit(family, unit)
    return commit is not None and commit.shard == orphan.name


def _require_not_indexed(dataset: Dataset, orphans: list[Orphan]) -> None:
    """DatasetError where the index names a shard whose commit record is not there: a record was lost."""
    if not orphans or not dataset.index_path.exists():
        return
    table = read_index(dataset.root, columns=["shard", "prompt_shard"])
    indexed = {name for column in table.columns for name in column.unique().to_pylist()}
    if lost := [orphan.name for orphan in orphans if orphan.name in indexed]:
        raise DatasetError(
            f"{dataset.root}: index.parquet names {len(lost)} shards, such as {lost[0]}, that no commit "
            "record names, so records are missing and nothing is removed. Put them back, or run "
            "`latentpress preprocess` with its config again, and then gc"
        )


def _local_temps() -> list[Orphan]:
    """Shards on their way to an object store whose process, on this machine, is gone."""
    found = []
    for path in Path(tempfile.gettempdir()).glob(f"{LOCAL_TEMP_PREFIX}*"):
        pid = path.name.removeprefix(LOCAL_TEMP_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            about = path.lstat()
            found.append(Orphan(str(path), _TEMP_ORPHAN, about.st_size, time.time() - about.st_mtime))
    return found


def _unfinished_uploads(dataset: Dataset) -> list[Orphan]:
    _, key = object_store.handle(dataset.root)
    bucket, _, prefix = key.partition("/")
    prefix = prefix and f"{prefix}/"
    found = []
    below = {"Bucket": bucket, "Prefix": prefix}
    for page in _pages(dataset, "list_multipart_uploads", ("KeyMarker", "UploadIdMarker"), below):
        for upload in page.get("Uploads", []):
            this = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            parts = _pages(dataset, "list_parts", ("PartNumberMarker",), this)
            nbytes = sum(part["Size"] for page in parts for part in page.get("Parts", []))
            age_s = time.time() - upload["Initiated"].timestamp()
            name = upload["Key"].removeprefix(prefix)
            found.append(Orphan(name, _UPLOAD_ORPHAN, nbytes, age_s, upload=upload["UploadId"]))
    return found


def _pages(
    dataset: Dataset, method: str, markers: tuple[str, ...], request: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Every page of an S3 listing."""
    fs, _ = object_store.handle(dataset.root)
    more = True
    while more:
        page = patiently(dataset.root, functools.partial(fs.call_s3, method, **request))
        yield page
        more = page.get("IsTruncated", False)
        request = {**request, **{name: page.get(f"Next{name}") for name in markers}}
