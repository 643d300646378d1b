"""One unit in one worker: rows left out on purpose, rows tried for nothing, and who made the record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.commit import commit_once, make_folder
from pipeline.generation import Unit, add_generation, pending_units
from pipeline.graph import wanted_card
from pipeline.source import identify
from pipeline.unit import UnitWorker
from schemas.card import Card, card_bytes, card_path
from schemas.config import PreprocessConfig
from schemas.dataset import Dataset
from schemas.load import check_config, open_sealed_json
from schemas.manifest import ManifestRow
from schemas.sample import FailureRecord, UnitCommit
from tests.videos import make_video

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def config(tmp_path: Path) -> PreprocessConfig:
    buckets = [{"num_frames": 9, "height": 32, "width": 48}]
    tree = {"manifest": "unused", "output": str(tmp_path / "out"), "buckets": buckets}
    return check_config(tree, PreprocessConfig, where="test")


@pytest.fixture
def card(config: PreprocessConfig) -> Card:
    return wanted_card(config)


@pytest.fixture
def unit(config: PreprocessConfig, card: Card, tmp_path: Path) -> Unit:
    """Three latents: two videos and one that cannot be opened."""
    for i in range(2):
        make_video(tmp_path / f"{i}.mp4", num_frames=12 + i)
    (tmp_path / "2.mp4").write_bytes(b"no video")
    rows = [ManifestRow(i + 1, f"{i}.mp4", str(tmp_path / f"{i}.mp4"), "a caption") for i in range(3)]
    dataset = Dataset(config.output)
    make_folder(dataset.root)
    commit_once(card_path(dataset.root), card_bytes(card))
    sources = identify([row.path for row in rows], mode="content", known={})
    add_generation(dataset, card, rows=rows, sources=sources, unit_rows=4)
    (unit,) = pending_units(dataset, "latents")
    return unit


@pytest.fixture
def worker(config: PreprocessConfig, card: Card) -> Iterator[UnitWorker]:
    worker = UnitWorker(config, card)
    yield worker
    worker.close()


def test_a_condemned_row_becomes_its_failure_and_is_not_looked_at(
    config: PreprocessConfig, worker: UnitWorker, unit: Unit
) -> None:
    condemned = unit.rows[1]
    Path(condemned["path"]).unlink()  # whoever looked at it would stop the run
    failure = FailureRecord(
        key=condemned["key"], stage="encode", reason="worker_crash", message="it died", attempts=2
    )
    result = worker.run(unit, condemned={condemned["key"]: failure})
    assert (result.kept, result.ours) == (1, True)
    assert set(result.failures) == {("worker_crash", "1.mp4"), ("open_failed", "2.mp4")}
    commit = Dataset(config.output).commit("latents", unit.number)
    assert commit is not None
    assert failure in commit.quarantined
    assert [sample.key for sample in commit.samples] == [unit.rows[0]["key"]]


def test_a_row_that_is_tried_alone_leaves_nothing(
    config: PreprocessConfig, worker: UnitWorker, unit: Unit
) -> None:
    before = sorted(Path(config.output).rglob("*"))
    for row in unit.rows:
        worker.try_row(unit, row["key"])
    (prompts,) = pending_units(Dataset(config.output), "prompts")
    worker.try_row(prompts, prompts.rows[0]["key"])
    assert sorted(Path(config.output).rglob("*")) == before


def test_the_second_of_two_workers_learns_that_it_was_not_first(
    config: PreprocessConfig, card: Card, worker: UnitWorker, unit: Unit
) -> None:
    first = worker.run(unit)
    second = worker.run(unit)
    assert (first.ours, second.ours) == (True, False)
    assert (first.kept, first.failures) == (second.kept, second.failures)


def test_a_worker_of_a_coordinator_hands_over_the_record_and_commits_nothing(
    config: PreprocessConfig, card: Card, unit: Unit
) -> None:
    worker = UnitWorker(config, card, "coordinator")
    result = worker.run(unit)
    worker.close()
    dataset = Dataset(config.output)
    assert dataset.commit("latents", unit.number) is None
    assert result.uncommitted is not None
    commit = UnitCommit.model_validate(open_sealed_json(result.uncommitted), strict=False)
    assert len(commit.samples) == 2
    assert (dataset.root / str(commit.shard)).exists()
