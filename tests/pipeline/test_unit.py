"""One unit in one worker: rows left out on purpose, rows tried for nothing, and who made the record."""

from __future__ import annotations

import errno
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.commit import commit_once, make_folder
from pipeline.generation import Unit, add_generation, pending_units
from pipeline.graph import wanted_card
from pipeline.shard_writer import ShardWriter
from pipeline.source import identify
from pipeline.starved import EncoderStarved
from pipeline.unit import UnitWorker
from pipeline.video_encode import DctEncoder, Moments
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
    return planned(config, card, tmp_path, 3)


def planned(config: PreprocessConfig, card: Card, folder: Path, count: int) -> Unit:
    """A new dataset's one unit of latents, of the videos 0, 1, ... in `folder`."""
    rows = [ManifestRow(i + 1, f"{i}.mp4", str(folder / f"{i}.mp4"), "a caption") for i in range(count)]
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
    for prompts in pending_units(Dataset(config.output), "prompts"):
        worker.try_row(prompts, prompts.rows[0]["key"])
    assert sorted(Path(config.output).rglob("*")) == before


def test_decoding_encoding_and_writing_go_on_beside_each_other(
    config: PreprocessConfig, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for what another can only do meanwhile; one after the other they would wait for ever."""
    second_clip_is_there, third_batch_is_begun = threading.Event(), threading.Event()
    order: list[str] = []

    class Watched(DctEncoder):
        calls = 0

        def buffer(self, num_clips: int, shape: tuple[int, int, int]) -> np.ndarray:
            self.calls += 1
            if self.calls == 2:
                second_clip_is_there.set()
            return super().buffer(num_clips, shape)

        def begin(self, frames: np.ndarray, *, tiled: bool = False) -> Callable[[], Moments]:
            number = sum(each.startswith("begun") for each in order)
            order.append(f"begun {number}")
            if number == 2:
                third_batch_is_begun.set()

            def wait() -> Moments:
                assert second_clip_is_there.wait(60), "no clip is decoded while one is encoded"
                order.append(f"encoded {number}")
                return super(Watched, self).encode(frames)

            return wait

    add = ShardWriter.add

    def watched_add(self: ShardWriter, *args: Any, **kwargs: Any) -> None:
        assert third_batch_is_begun.wait(60), "nothing is encoded while a sample is written"
        order.append("written")
        add(self, *args, **kwargs)

    monkeypatch.setattr("pipeline.encoders.load_video_encoder", lambda config, **_: Watched(config))
    monkeypatch.setattr(ShardWriter, "add", watched_add)
    for i in range(4):
        make_video(tmp_path / f"{i}.mp4", num_frames=12 + i)
    worker = UnitWorker(config, card)
    result = worker.run(planned(config, card, tmp_path, 4))
    worker.close()
    assert (result.kept, result.failures) == (4, ())
    assert order.index("begun 2") < order.index("written")
    assert [each for each in order if each != "written"] == [
        f"{what} {number}" for number in range(4) for what in ("begun", "encoded")
    ]


def test_a_unit_whose_writing_fails_ends_with_that_error_and_leaves_nothing(
    config: PreprocessConfig, worker: UnitWorker, unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: ShardWriter, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", full)
        with pytest.raises(OSError, match="No space left"):
            worker.run(unit)
    assert not [path for path in Path(config.output, "latents").rglob("*") if path.is_file()]
    assert worker.run(unit).kept == 2


def test_what_gave_way_is_told_at_once_and_goes_with_a_unit_that_fails_and_its_seconds_count(
    config: PreprocessConfig, card: Card, unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Starving(DctEncoder):
        lasts = True

        def load(self) -> None:
            assert told == []

        def batch_size(self, shape: tuple[int, int, int]) -> int:
            return 2

        def begin(self, frames: np.ndarray, *, tiled: bool = False) -> Callable[[], Moments]:
            if self.lasts or len(frames) > 1:
                raise MemoryError("no room")
            assert len(told) == 1
            return super().begin(frames, tiled=tiled)

    told: list[str] = []
    monkeypatch.setattr("pipeline.encoders.load_video_encoder", lambda config, **_: Starving(config))
    worker = UnitWorker(config, card, tell=told.append)
    with pytest.raises(EncoderStarved, match="encoding 1 clip") as failed:
        worker.run(unit)
    ((kind, sentence),) = vars(failed.value)["incidents"]
    assert (kind, told) == ("batch_halved", [f"note: {sentence}"])
    again = pickle.loads(pickle.dumps(failed.value))
    assert again.incidents == ((kind, sentence),)

    monkeypatch.setattr(Starving, "lasts", False)
    assert worker.run(unit).incidents == ()
    worker.close()
    told.clear()
    worker = UnitWorker(config, card, tell=told.append)
    result = worker.run(unit)
    worker.close()
    assert len(result.incidents) == len(told) == 1
    assert result.seconds["load"] > 0, "though it was the first attempt that loaded the encoder"
    assert result.seconds["decoders"] > 0


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
