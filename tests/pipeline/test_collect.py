"""gc: what killed runs left goes, what anything needs stays."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from jobs.gc import gc
from pipeline import commit
from pipeline.collect import find_orphans, remove
from pipeline.generation import pending_units
from schemas.card import Card
from schemas.check import check_dataset
from schemas.dataset import Dataset
from schemas.errors import DatasetError
from tests.pipeline.fake import ask, finish, make_dataset, make_rows, write_unit

DAY_S = 24 * 3600.0


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three units of latents, three of prompts, all committed and more than a day old."""
    dataset, card = make_dataset(tmp_path / "latents")
    ask(dataset, card, make_rows(tmp_path / "videos", 5))
    finish(dataset, card)
    age(dataset.root, 2 * DAY_S)
    return dataset


def age(root: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in [root, *root.rglob("*")]:
        os.utime(path, (then, then))


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def leave(dataset: Dataset) -> set[str]:
    """What runs that were killed at each step leave: temp files, shards, a lock that was taken over."""
    left = {
        "manifest/.tmp-7-0123456789ab",
        "commits/00/.tmp-7-0123456789ab",
        ".tmp-7-0123456789ab",
        "latents/00/.tmp-7-0123456789ab",
        "latents/00/u00000000-0123456789ab.tar",  # of a unit that is committed with another shard
        "latents/00/u00000077-0123456789ab.tar",  # of a unit that is not
        "prompts/00/t00000000-0123456789ab.tar",
        "runs/then/.tmp-7-0123456789ab",
        ".tmp-lock-0123456789ab/owner.json",
    }
    for name in left:
        (dataset.root / name).parent.mkdir(parents=True, exist_ok=True)
        (dataset.root / name).write_bytes(b"left behind")
    return left


def test_what_killed_runs_left_goes_and_the_rest_stays(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(dataset.root)
    left = leave(dataset)
    age(dataset.root, 2 * DAY_S)
    assert gc(dataset.root, older_than_h=24, dry_run=True, as_json=False) == 0
    assert files(dataset.root).keys() == before.keys() | left
    listed = capsys.readouterr().out
    assert all(name.removesuffix("/owner.json") in listed for name in left)
    assert "9 orphans older than 24 h would be removed" in listed

    assert gc(dataset.root, older_than_h=24, dry_run=False, as_json=True) == 0
    assert files(dataset.root) == before
    told = json.loads(capsys.readouterr().out)
    assert len(told["orphans"]) == 9
    assert told["bytes"] >= 8 * len(b"left behind")
    assert check_dataset(dataset.root).clean


def test_what_is_younger_than_the_age_stays(dataset: Dataset) -> None:
    leave(dataset)
    assert find_orphans(dataset, older_than_s=DAY_S) == []
    assert len(find_orphans(dataset, older_than_s=0)) == 9


def test_names_that_no_run_gives_are_left_alone(dataset: Dataset) -> None:
    for name in (
        "notes.txt",
        ".coordinator/owner.json",
        "latents/00/mine.tar",
        "latents/07/u00000000-0123456789ab.tar",  # not the folder of that unit
        "prompts/00/u00000000-0123456789ab.tar",  # not its family
        "latents/00/u00000000-0123456789ab.tar.bak",
    ):
        (dataset.root / name).parent.mkdir(parents=True, exist_ok=True)
        (dataset.root / name).write_bytes(b"mine")
    age(dataset.root, 2 * DAY_S)
    assert find_orphans(dataset, older_than_s=DAY_S) == []


def shards_without_records(tmp_path: Path) -> tuple[Dataset, Card]:
    """What a run leaves that was killed before every record, more than a day ago."""
    dataset, card = make_dataset(tmp_path / "latents")
    ask(dataset, card, make_rows(tmp_path / "videos", 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.shard_writer.commit_once", lambda path, data: True)
        for unit in [*pending_units(dataset, "prompts"), *pending_units(dataset, "latents")]:
            write_unit(dataset, card, unit)
    age(dataset.root, 2 * DAY_S)
    return dataset, card


def test_a_shard_that_is_committed_after_it_was_listed_stays(tmp_path: Path) -> None:
    """A run makes a unit again whose first try was killed: the shard has the same name."""
    dataset, card = shards_without_records(tmp_path)
    listed = find_orphans(dataset, older_than_s=DAY_S)
    assert len(listed) == 3
    finish(dataset, card)
    assert [remove(dataset, orphan) for orphan in listed] == [False, False, False]
    assert check_dataset(dataset.root).clean


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_shard_that_is_committed_while_it_is_removed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, links: bool
) -> None:
    """A run publishes it again, and commits, right before or after gc takes it aside."""
    dataset, card = shards_without_records(tmp_path)
    listed = find_orphans(dataset, older_than_s=DAY_S)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    def race(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        if moment == "after":
            rename(source, target)
        finish(dataset, card)
        if moment == "before":
            rename(source, target)
        if not links:
            monkeypatch.setattr(os, "link", refuse)

    monkeypatch.setattr(os, "rename", race)
    assert [remove(dataset, orphan) for orphan in listed] == [False, False, False]
    assert check_dataset(dataset.root).clean
    assert find_orphans(dataset, older_than_s=0) == []
    shards = [path.stat() for path in dataset.root.rglob("*.tar")]
    assert all(time.time() - shard.st_mtime < DAY_S for shard in shards), "what was published is there"


def test_a_temp_file_that_is_written_again_stays(dataset: Dataset) -> None:
    leave(dataset)
    age(dataset.root, 2 * DAY_S)
    listed = find_orphans(dataset, older_than_s=DAY_S)
    age(dataset.root, 60)
    assert not any(remove(dataset, orphan) for orphan in listed)


def test_without_a_card_nothing_is_judged(dataset: Dataset) -> None:
    (dataset.root / "card.json").unlink()
    with pytest.raises(DatasetError, match="card"):
        find_orphans(dataset, older_than_s=0)


def test_lost_commit_records_make_no_orphans(dataset: Dataset) -> None:
    before = files(dataset.root)
    for path in (dataset.root / "commits").rglob("*.json"):
        path.unlink()
    with pytest.raises(DatasetError, match="records are missing and nothing is removed"):
        gc(dataset.root, older_than_h=24, dry_run=False, as_json=False)
    assert files(dataset.root) == {n: data for n, data in before.items() if not n.startswith("commits")}


def test_a_damaged_commit_record_stops_it(dataset: Dataset) -> None:
    path = dataset.commit_path("latents", 1)
    path.write_bytes(path.read_bytes().replace(b"latents", b"latentz"))
    with pytest.raises(DatasetError, match=r"u00000001\.json is damaged"):
        find_orphans(dataset, older_than_s=0)


def test_the_lock_of_a_run_is_no_orphan(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with commit.open_store(dataset.root) as committing:
        assert committing == "coordinator"
        assert find_orphans(dataset, older_than_s=0) == []
