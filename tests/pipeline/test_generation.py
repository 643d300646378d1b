"""Growth: only what changed runs, and unit boundaries never move."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.generation import pending_units
from pipeline.outlook import Outlook
from pipeline.reindex import update_tables
from schemas.check import check_dataset
from schemas.dataset import Dataset
from schemas.index import read_index
from tests.pipeline.fake import ask, finish, make_dataset, make_rows, write_unit


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "latents"


def shards(dataset: Dataset) -> dict[str, bytes]:
    return {str(p.relative_to(dataset.root)): p.read_bytes() for p in dataset.root.glob("*/*/*.tar")}


def live_rows(dataset: Dataset) -> list[dict[str, Any]]:
    return dataset.history().live_table().to_pylist()


def changed(outlook: Outlook) -> dict[str, int]:
    """What it counts, without what is simply there or runs."""
    quiet = ("rows", "clips", "units_unfinished", "clips_to_encode", "captions_to_encode")
    return {name: count for name, count in outlook.as_dict().items() if count and name not in quiet}


def test_the_same_rows_in_any_order_change_nothing(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 5)
    assert changed(ask(dataset, card, rows)) == {"new": 5}
    finish(dataset, card)
    assert changed(ask(dataset, card, rows[::-1])) == {}
    assert dataset.history().generations == 1
    assert [*pending_units(dataset, "latents"), *pending_units(dataset, "prompts")] == []


def test_added_rows_make_new_units_and_leave_the_old_shards_alone(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 3)
    ask(dataset, card, rows)
    finish(dataset, card)
    before = shards(dataset)
    assert changed(ask(dataset, card, make_rows(tmp_path / "videos", 6))) == {"new": 3}
    assert [unit.number for unit in pending_units(dataset, "latents")] == [2, 3]
    assert list(pending_units(dataset, "prompts")) == []  # the captions are the old ones
    finish(dataset, card)
    after = shards(dataset)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2


def test_an_edited_caption_runs_the_text_encoder_alone(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 3)
    ask(dataset, card, rows)
    finish(dataset, card)
    rows[1] = dataclasses.replace(rows[1], caption="edited")
    outlook = ask(dataset, card, rows)
    assert changed(outlook) == {"captions_changed": 1}
    assert str(outlook) == "3 rows: 1 caption changed: prompts only"
    assert list(pending_units(dataset, "latents")) == []
    assert [[row["caption"] for row in unit.rows] for unit in pending_units(dataset, "prompts")] == [
        ["edited"]
    ]
    finish(dataset, card)
    assert sorted(row["caption"] for row in live_rows(dataset)) == ["caption 0", "caption 2", "edited"]


def test_a_replaced_file_is_a_new_sample(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    ask(dataset, card, rows)
    finish(dataset, card)
    Path(rows[0].path).write_bytes(b"another video")
    assert changed(ask(dataset, card, rows)) == {"files_replaced": 1}
    (unit,) = pending_units(dataset, "latents")
    assert [row["source"] for row in unit.rows] == ["0.mp4"]
    assert len(live_rows(dataset)) == 2


def test_equal_content_shares_latents_and_keeps_its_captions(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    Path(rows[1].path).write_bytes(Path(rows[0].path).read_bytes())
    ask(dataset, card, rows)
    (unit,) = pending_units(dataset, "latents")
    assert len(unit.rows) == 1
    finish(dataset, card)
    live = live_rows(dataset)
    assert len({row["sample_id"] for row in live}) == 1
    assert {row["caption"] for row in live} == {"caption 0", "caption 1"}


def test_removed_rows_leave_the_view_and_come_back_without_work(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 4)
    ask(dataset, card, rows)
    finish(dataset, card)
    outlook = ask(dataset, card, rows[:1])
    assert changed(outlook) == {"removed": 3}
    assert str(outlook) == "1 row: 3 removed: hidden, nothing rewritten"
    assert len(live_rows(dataset)) == 1
    assert changed(ask(dataset, card, rows)) == {"new": 3}
    assert list(pending_units(dataset, "latents")) == []
    assert len(live_rows(dataset)) == 4


def test_what_a_unit_holds_does_not_depend_on_when_it_runs(root: Path, tmp_path: Path) -> None:
    """A row removed before its unit ran stays in the unit, so that it is there when it is asked for again."""
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 4)
    ask(dataset, card, rows)
    planned = [[row["key"] for row in unit.rows] for unit in pending_units(dataset, "latents")]
    ask(dataset, card, [rows[0], rows[2], rows[3]])
    units = pending_units(dataset, "latents")
    assert [[row["key"] for row in unit.rows] for unit in units] == planned
    assert [row["live"] for unit in units for row in unit.rows] == [True, False, True, True]


def test_a_touched_or_annotated_row_is_noted_without_work(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    ask(dataset, card, rows)
    finish(dataset, card)
    os.utime(rows[0].path, ns=(5, 5))
    rows[1] = dataclasses.replace(rows[1], extra={"tag": "new"})
    assert changed(ask(dataset, card, rows)) == {}
    assert [*pending_units(dataset, "latents"), *pending_units(dataset, "prompts")] == []
    first, second = live_rows(dataset)
    assert first["mtime_ns"] == 5
    assert second["extra"] == '{"tag": "new"}'
    assert changed(ask(dataset, card, rows)) == {}
    assert dataset.history().generations == 2


def test_a_row_that_its_unit_left_out_gets_another_unit(root: Path, tmp_path: Path) -> None:
    """Its file was gone when the unit ran; when both come back, it runs in a unit of its own."""
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    ask(dataset, card, rows)
    ask(dataset, card, rows[1:])
    (unit,) = pending_units(dataset, "latents")
    assert [row["live"] for row in unit.rows] == [False, True]
    write_unit(dataset, card, dataclasses.replace(unit, rows=unit.rows[1:]))
    assert changed(ask(dataset, card, rows)) == {"new": 1, "to_retry": 1}
    (unit,) = pending_units(dataset, "latents")
    assert unit.number == 1
    assert [(row["source"], row["live"]) for row in unit.rows] == [("0.mp4", True)]
    finish(dataset, card)
    assert check_dataset(root).clean


def test_a_live_row_that_its_unit_left_out_is_healed_by_the_next_plan(root: Path, tmp_path: Path) -> None:
    """Another driver, which did not ask for it, ran the unit while its file was away."""
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 3)
    ask(dataset, card, rows)
    first, _ = pending_units(dataset, "latents")
    write_unit(dataset, card, dataclasses.replace(first, rows=first.rows[1:]))
    finish(dataset, card)
    assert read_index(root)["source"].to_pylist() == ["1.mp4", "2.mp4"]
    outlook = ask(dataset, card, rows)
    assert changed(outlook) == {"to_retry": 1}
    assert str(outlook) == "3 rows: 1 to retry"
    finish(dataset, card)
    assert read_index(root)["source"].to_pylist() == ["1.mp4", "2.mp4", "0.mp4"]
    assert changed(ask(dataset, card, rows)) == {}
    assert check_dataset(root).clean


def test_a_row_lost_with_its_commit_record_leaves_the_index_until_it_is_made_again(
    root: Path, tmp_path: Path
) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 4)
    ask(dataset, card, rows)
    finish(dataset, card)
    whole = read_index(root)
    dataset.commit_path("latents", 0).unlink()
    update_tables(dataset, card)
    assert read_index(root)["unit"].to_pylist() == [1, 1]
    outlook = ask(dataset, card, rows)
    assert str(outlook) == "4 rows: 1 unit unfinished"
    finish(dataset, card)
    assert read_index(root).equals(whole)


def test_tables_that_are_damaged_or_gone_are_made_again(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    ask(dataset, card, make_rows(tmp_path / "videos", 9))
    finish(dataset, card)
    whole = {path: path.read_bytes() for path in (dataset.index_path, dataset.quarantine_path)}
    update_tables(dataset, card)
    dataset.index_path.write_bytes(whole[dataset.index_path][:-9] + b"x" + whole[dataset.index_path][-8:])
    dataset.quarantine_path.unlink()
    counts = update_tables(dataset, card)
    assert (counts.kept, counts.quarantined, counts.reasons) == (8, 1, {"bad": 1})
    assert {path: path.read_bytes() for path in whole} == whole


def test_a_renamed_file_runs_nothing(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    ask(dataset, card, rows)
    finish(dataset, card)
    path = Path(rows[0].path).rename(tmp_path / "renamed.mp4")
    rows[0] = dataclasses.replace(rows[0], source="renamed.mp4", path=str(path))
    outlook = ask(dataset, card, rows)
    assert str(outlook) == "2 rows: 1 moved: nothing runs"
    assert (outlook.clips_to_encode, outlook.captions_to_encode) == (0, 0)
    finish(dataset, card)
    assert sorted(read_index(root)["source"].to_pylist()) == ["1.mp4", "renamed.mp4"]


def test_a_unit_is_made_from_the_copy_that_is_still_asked_for(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    Path(rows[1].path).write_bytes(Path(rows[0].path).read_bytes())
    ask(dataset, card, rows)
    ask(dataset, card, rows[:1])
    Path(rows[1].path).unlink()
    (unit,) = pending_units(dataset, "latents")
    assert [(row["source"], row["live"]) for row in unit.rows] == [("0.mp4", True)]
    finish(dataset, card)
    assert read_index(root)["source"].to_pylist() == ["0.mp4"]
