"""Growth: only what changed runs, and unit boundaries never move."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from pipeline.generation import pending_units
from schemas.check import check_dataset
from schemas.dataset import Dataset
from tests.pipeline.fake import ask, finish, make_dataset, make_rows, write_unit


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "latents"


def shards(dataset: Dataset) -> dict[str, bytes]:
    return {str(p.relative_to(dataset.root)): p.read_bytes() for p in dataset.root.glob("*/*/*.tar")}


def test_the_same_rows_in_any_order_change_nothing(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 5)
    assert ask(dataset, card, rows) == {"added": 5, "removed": 0}
    finish(dataset, card)
    assert ask(dataset, card, rows[::-1]) == {"added": 0, "removed": 0}
    assert len(dataset.generations()) == 1
    assert pending_units(dataset, "latents") == pending_units(dataset, "prompts") == []


def test_added_rows_make_new_units_and_leave_the_old_shards_alone(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 3)
    ask(dataset, card, rows)
    finish(dataset, card)
    before = shards(dataset)
    assert ask(dataset, card, make_rows(tmp_path / "videos", 6)) == {"added": 3, "removed": 0}
    assert [unit.number for unit in pending_units(dataset, "latents")] == [2, 3]
    assert pending_units(dataset, "prompts") == []  # the captions are the old ones
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
    assert ask(dataset, card, rows) == {"added": 1, "removed": 1}
    assert pending_units(dataset, "latents") == []
    assert [[row["caption"] for row in unit.rows] for unit in pending_units(dataset, "prompts")] == [
        ["edited"]
    ]
    finish(dataset, card)
    assert sorted(row["caption"] for row in dataset.live_rows()) == ["caption 0", "caption 2", "edited"]


def test_a_replaced_file_is_a_new_sample(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    ask(dataset, card, rows)
    finish(dataset, card)
    Path(rows[0].path).write_bytes(b"another video")
    assert ask(dataset, card, rows) == {"added": 1, "removed": 1}
    (unit,) = pending_units(dataset, "latents")
    assert [row["source"] for row in unit.rows] == ["0.mp4"]
    assert len(dataset.live_rows()) == 2


def test_equal_content_shares_latents_and_keeps_its_captions(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    Path(rows[1].path).write_bytes(Path(rows[0].path).read_bytes())
    ask(dataset, card, rows)
    (unit,) = pending_units(dataset, "latents")
    assert len(unit.rows) == 1
    finish(dataset, card)
    live = dataset.live_rows()
    assert len({row["sample_id"] for row in live}) == 1
    assert {row["caption"] for row in live} == {"caption 0", "caption 1"}


def test_removed_rows_leave_the_view_and_come_back_without_work(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 4)
    ask(dataset, card, rows)
    finish(dataset, card)
    assert ask(dataset, card, rows[:1]) == {"added": 0, "removed": 3}
    assert len(dataset.live_rows()) == 1
    assert ask(dataset, card, rows) == {"added": 3, "removed": 0}
    assert pending_units(dataset, "latents") == []
    assert len(dataset.live_rows()) == 4


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
    assert ask(dataset, card, rows) == {"added": 0, "removed": 0}
    assert pending_units(dataset, "latents") == pending_units(dataset, "prompts") == []
    first, second = dataset.live_rows()
    assert first["mtime_ns"] == 5
    assert second["extra"] == '{"tag": "new"}'
    assert ask(dataset, card, rows) == {"added": 0, "removed": 0}
    assert len(dataset.generations()) == 2


def test_a_row_that_its_unit_left_out_gets_another_unit(root: Path, tmp_path: Path) -> None:
    """Its file was gone when the unit ran; when both come back, it runs in a unit of its own."""
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    ask(dataset, card, rows)
    ask(dataset, card, rows[1:])
    (unit,) = pending_units(dataset, "latents")
    assert [row["live"] for row in unit.rows] == [False, True]
    write_unit(dataset, card, dataclasses.replace(unit, rows=unit.rows[1:]))
    assert ask(dataset, card, rows) == {"added": 1, "removed": 0}
    (unit,) = pending_units(dataset, "latents")
    assert unit.number == 1
    assert [(row["source"], row["live"]) for row in unit.rows] == [("0.mp4", True)]
    finish(dataset, card)
    assert check_dataset(root).clean
