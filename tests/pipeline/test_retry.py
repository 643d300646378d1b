"""Retry: quarantined rows get another unit, nothing that is committed changes, attempts add up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from jobs.retry import retry
from pipeline.generation import pending_units
from pipeline.retry import retry_failed
from schemas.card import Card
from schemas.check import check_dataset
from schemas.dataset import Dataset
from schemas.errors import ConfigError
from schemas.index import read_index, read_quarantine
from tests.pipeline.fake import ask, finish, make_dataset, make_rows, write_unit


@pytest.fixture
def made(tmp_path: Path) -> tuple[Dataset, Card]:
    """Nine rows, of which `7.mp4` cannot be decoded; it is asked for under two captions."""
    dataset, card = make_dataset(tmp_path / "latents")
    rows = make_rows(tmp_path / "videos", 9)
    ask(dataset, card, [*rows, dataclasses.replace(rows[7], caption="again")], unit_rows=4)
    finish(dataset, card)
    return dataset, card


def test_a_retried_row_runs_alone_and_its_attempts_add_up(made: tuple[Dataset, Card]) -> None:
    dataset, card = made
    before = {path: path.read_bytes() for path in dataset.root.rglob("*.tar")}
    for attempts in (2, 3):
        assert retry_failed(dataset, card, reasons=["bad"]) == {"bad": 2}
        assert read_quarantine(dataset.root).num_rows == 0
        assert check_dataset(dataset.root).unfinished == 1
        (unit,) = pending_units(dataset, "latents")
        assert [row["source"] for row in unit.rows] == ["7.mp4"]
        assert list(pending_units(dataset, "prompts")) == []
        finish(dataset, card)
        failed = read_quarantine(dataset.root)
        assert failed["attempts"].to_pylist() == [attempts, attempts]
        assert failed["unit"].to_pylist() == [unit.number] * 2
    assert {path: path.read_bytes() for path in dataset.root.rglob("*.tar")} == before
    assert check_dataset(dataset.root).clean


def test_a_retried_row_that_succeeds_is_kept_once(
    made: tuple[Dataset, Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, card = made
    retry_failed(dataset, card, reasons=None)
    monkeypatch.setattr("tests.pipeline.fake._BROKEN_DIGEST", "none")
    finish(dataset, card)
    captions = [row["caption"] for row in read_index(dataset.root).to_pylist() if row["source"] == "7.mp4"]
    assert captions == ["caption 1", "again"]
    assert read_quarantine(dataset.root).num_rows == 0
    assert check_dataset(dataset.root).clean
    # Its old unit, made again, leaves it out: it belongs to the new one.
    dataset.commit_path("latents", 1).unlink()
    (unit,) = pending_units(dataset, "latents")
    assert [row["source"] for row in unit.rows] == ["4.mp4", "5.mp4", "6.mp4"]
    write_unit(dataset, card, unit)
    assert check_dataset(dataset.root).clean


def test_outlook_and_command_say_how_many(
    made: tuple[Dataset, Card], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, card = made
    with pytest.raises(ConfigError, match=r"--reason lost: .*quarantined there: bad \(2\)"):
        retry(dataset.root, reasons=["lost"], everything=False, as_json=False)
    with pytest.raises(ConfigError, match=r"--reason CODE, .*reasons here: bad"):
        retry(dataset.root, reasons=[], everything=False, as_json=False)
    assert retry(dataset.root, reasons=["bad"], everything=False, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": 2, "reasons": {"bad": 2}}
    rows = [row for row in make_rows(tmp_path / "videos", 9) if row.source != "3.mp4"]
    said = str(ask(dataset, card, rows))
    assert said == "8 rows: 2 removed: hidden, nothing rewritten, 1 to retry"
    finish(dataset, card)
    assert retry(dataset.root, reasons=[], everything=True, as_json=False) == 0
    assert "1 row waits to be tried again: run `latentpress preprocess`" in capsys.readouterr().out
