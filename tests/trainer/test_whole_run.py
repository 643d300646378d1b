"""A run of stages, each on a mesh of its own: the same record on one rank and on two, stopped or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schemas.train_config import TrainConfig
from tests.trainer.datasets import SHAPES, write_dataset
from tests.trainer.gloo import on_two_ranks
from tests.trainer.test_loop import config, run, run_and_stop
from tests.trainer.test_parallel import alone
from trainer.catalog import Catalog
from trainer.checkpoint import find_checkpoint
from trainer.export import export
from trainer.loader import Loader
from trainer.metrics import read_records

VALIDATION = {"share": 0.4, "timesteps": [0.2, 0.8]}
STOP_AFTER = 4
"""Inside the second stage."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def weights(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is not the one that runs start from."""
    folder = tmp_path_factory.mktemp("weights")
    stage = {"name": "other", "steps": 3, "lr": {"peak": 3e-2, "kind": "constant"}}
    alone(run, config(dataset, folder / "run", seed=5, stages=[stage]))
    export(find_checkpoint(folder / "run"), folder / "model")
    return folder / "model"


def stages(weights: Path, *, meshes: bool) -> list[dict[str, Any]]:
    """All weights, then adapters beside others, then all again with those in them."""
    first = {"name": "first", "steps": 3, "lr": {"peak": 3e-3, "warmup": 2}}
    second = {"name": "second", "steps": 4, "lr": {"peak": 2e-2, "warmup": 2, "end": 1e-2}}
    third = {"name": "third", "steps": 3, "lr": {"peak": 1e-3, "warmup": 2}, "max_frames": 9}
    second |= {"init": str(weights), "lora": {"rank": 2}}
    if meshes:
        first["mesh"], third["mesh"] = {"sp": 2}, {"tp": 2}
    return [first, second, third]


def settings(dataset: Path, output: Path, **changes: Any) -> TrainConfig:
    return config(dataset, output, validation=VALIDATION, **changes)


def steps(output: Path) -> list[dict[str, Any]]:
    return read_records(output / "metrics.jsonl")


@pytest.fixture(scope="module")
def one(dataset: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the whole run on one rank."""
    output = tmp_path_factory.mktemp("one")
    alone(run, settings(dataset, output, stages=stages(weights, meshes=False)))
    return output


def test_stages_of_all_meshes_stopped_and_resumed_are_those_of_one_rank(
    dataset: Path, weights: Path, one: Path, tmp_path: Path
) -> None:
    both = settings(dataset, tmp_path, stages=stages(weights, meshes=True))
    on_two_ranks(run_and_stop, both, STOP_AFTER)
    assert find_checkpoint(tmp_path).step == STOP_AFTER
    on_two_ranks(run, both)
    assert [record["step"] for record in steps(tmp_path)] == list(range(1, 11))
    for found, wanted in zip(steps(tmp_path), steps(one), strict=True):
        for name in ("step", "stage", "lr", "tokens", "fill"):
            assert found[name] == wanted[name], found
        assert found["loss"] == pytest.approx(wanted["loss"], rel=2e-5), found
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3), found
        assert found["loss_by_duration"] == pytest.approx(wanted["loss_by_duration"], rel=2e-5), found
    looks = [read_records(output / "metrics.jsonl", kind="validation") for output in (tmp_path, one)]
    assert [record["step"] for record in looks[0]] == [3, 7, 10]
    for found, wanted in zip(*looks, strict=True):
        assert (found["step"], found["stage"]) == (wanted["step"], wanted["stage"])
        for name in ("loss", "shuffled_loss"):
            assert found[name] == pytest.approx(wanted[name], rel=2e-5), found
    # Numbers that would be the same whatever was learned would prove nothing.
    assert len({round(record["loss"], 4) for record in looks[0]}) == 3
    assert all(record["loss"] != record["shuffled_loss"] for record in looks[0])


def test_the_learning_rate_is_that_of_each_stages_own_steps(one: Path) -> None:
    expected = [1.5e-3, 3e-3, 3e-3, 1e-2, 2e-2, 2e-2, 1.5e-2, 5e-4, 1e-3, 1e-3]
    assert [record["lr"] for record in steps(one)] == pytest.approx(expected)


def test_a_stage_of_a_run_is_what_it_is_alone(
    dataset: Path, weights: Path, one: Path, tmp_path: Path
) -> None:
    """It starts from its own weights, with moments and learning rate of its own."""
    second = stages(weights, meshes=False)[1] | {"init": ""}
    alone(run, settings(dataset, tmp_path, stages=[second], model={"init": str(weights)}))
    found, wanted = steps(tmp_path), [record for record in steps(one) if record["stage"] == "second"]
    assert len(found) == 4
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert [record[name] for record in found] == [record[name] for record in wanted]
    start = settings(dataset, tmp_path / "start", stages=[second])
    alone(run, start)
    assert abs(steps(tmp_path / "start")[0]["loss"] - found[0]["loss"]) > 1e-4


def damaged(folder: Path) -> Path:
    """A dataset whose only clip of more than three seconds cannot be read."""
    dataset = write_dataset(folder, shapes=(*SHAPES, (33, 32, 32)))
    places = Catalog(dataset).places["mean"]
    row = int(places.shape[:, 0].argmax())
    path = dataset / places.shard_names[places.shard[row]]
    content = bytearray(path.read_bytes())
    content[int(places.offset[row])] ^= 255
    path.write_bytes(content)
    return dataset


def test_a_clip_that_cannot_be_read_counts_once_on_all_ranks_and_in_no_loss(tmp_path: Path) -> None:
    """It is visited again and again, first by the rank that writes no record, then by the one that does."""
    dataset = damaged(tmp_path / "set")
    data = {"budget_tokens": 64, "slots": 2, "max_unreadable": 1, "prefetch": 0}
    only = [{"name": "only", "steps": 9, "lr": {"peak": 3e-3}}]
    runs = {name: config(dataset, tmp_path / name, seed=1, stages=only, data=data) for name in ("one", "two")}
    visits = []
    for rank in range(2):
        with Loader(Catalog(dataset), config=runs["two"], rank=rank, world_size=2) as loader:
            segments = [(s, clip) for s in range(9) for pack in loader.packs(s) for clip in pack.segments]
            visits.append([step for step, clip in segments if not clip.weight])
    assert visits[1][0] < visits[0][0]
    alone(run, runs["one"])
    on_two_ranks(run, runs["two"])
    for found, wanted in zip(steps(tmp_path / "two"), steps(tmp_path / "one"), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=2e-5), found
        assert found["unreadable"] == wanted["unreadable"]
        assert found["loss_by_duration"].keys() == {"0-3s"}
        assert found["loss_by_duration"] == pytest.approx(wanted["loss_by_duration"], rel=2e-5)
    assert steps(tmp_path / "one")[-1]["unreadable"] == 1
