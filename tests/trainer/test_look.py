"""The loop looks at what it trains: the same numbers and samples however many ranks there are."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.train import to_do
from schemas.errors import RunError
from schemas.load import check_config
from schemas.train_config import TrainConfig
from tests.trainer.datasets import write_dataset
from tests.trainer.gloo import on_two_ranks
from trainer import loop, sharding, stage_model
from trainer.checkpoint import find_checkpoint
from trainer.export import export
from trainer.look import Looks, show
from trainer.metrics import read_records
from trainer.model import PackedModel, build_model
from trainer.objective import read_schedule
from trainer.parallel import Member, World, join
from trainer.sample import Sample
from trainer.saver import Saver
from trainer.sharding import fill

Written = list[tuple[str, list[tuple[str, torch.Tensor]]]]
"""Folder, then sample id and latents of each."""


class Noted:
    """Pictures that only remember."""

    def __init__(self) -> None:
        self.written: Written = []

    def write(self, folder: Path, samples: Sequence[Sample]) -> None:
        found = [(sample.reference.sample_id, sample.latents) for sample in samples]
        self.written.append((folder.relative_to(folder.parents[1]).as_posix(), found))


def run(world: World, config: TrainConfig, pictures: Noted | None = None) -> Written:
    pictures = pictures or Noted()
    Path(config.output).mkdir(parents=True, exist_ok=True)
    loop.train(config, world=world, pictures=pictures)
    return pictures.written


def run_and_stop(world: World, config: TrainConfig, after: int) -> Written:
    """The last rank is told to stop while step `after` of this start runs."""
    clip_grad_norm, calls = sharding.clip_grad_norm, itertools.count(1)

    def counting(*args: Any, **kwargs: Any) -> float:
        if next(calls) == after and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip_grad_norm(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "clip_grad_norm", counting)
        return run(world, config)


def run_and_stop_in(world: World, config: TrainConfig, owner: type, name: str) -> list[int]:
    """The last rank is told to stop in each call of a method; the steps that there are records of."""
    method = getattr(owner, name)

    def told(*args: Any, **kwargs: Any) -> None:
        if world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        method(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, told)
        run(world, config)
    return [record["step"] for record in read_records(Path(config.output) / "metrics.jsonl")]


def alone(config: TrainConfig) -> Written:
    with join(Member.alone(), config.mesh, deterministic=True) as world:
        return run(world, config)


def config(dataset: Path, output: Path, **changes: Any) -> TrainConfig:
    tree: dict[str, Any] = {
        "dataset": str(dataset),
        "output": str(output),
        "model": {"num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 16},
        "data": {"budget_tokens": 64, "slots": 2},
        "loss": {"objective": "flow", "shift": 2.0},
        "validation": {"share": 0.5, "every": 2, "samples": 2, "sample_steps": 2, "timesteps": [0.2, 0.8]},
        "stages": [{"name": "only", "steps": 3, "lr": {"peak": 3e-3, "warmup": 2}}],
    }
    return check_config(tree | changes, TrainConfig, where="test")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("look") / "set")


def validations(output: Path) -> list[dict[str, Any]]:
    return read_records(output / "metrics.jsonl", kind="validation")


@pytest.fixture(scope="module")
def seen(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Written]:
    """The output of a run on one rank, and its pictures."""
    output = tmp_path_factory.mktemp("seen")
    return output, alone(config(dataset, output))


def test_the_loop_validates_and_draws_samples(seen: tuple[Path, Written]) -> None:
    output, written = seen
    records = validations(output)
    assert [(record["step"], record["stage"]) for record in records] == [(2, "only"), (3, "only")]
    for record in records:
        assert list(record["loss_by_timestep"]) == ["0.2", "0.8"]
        assert 0 < record["clips"] < 7
    assert [folder for folder, _ in written] == ["samples/step-000002", "samples/step-000003"]
    (_, first), (_, second) = written
    assert len(first) == 2
    assert [sample for sample, _ in first] == [sample for sample, _ in second]
    assert not torch.equal(first[0][1], second[0][1])


@pytest.mark.parametrize("mesh", [{}, {"sp": 2}, {"tp": 2}])
def test_neither_depends_on_the_ranks(
    mesh: dict[str, int], dataset: Path, seen: tuple[Path, Written], tmp_path: Path
) -> None:
    main, other = on_two_ranks(run, config(dataset, tmp_path, mesh=mesh))
    assert other == []  # the first rank shows them
    for record, expected in zip(validations(tmp_path), validations(seen[0]), strict=True):
        assert record["clips"] == expected["clips"]
        for name in ("loss", "shuffled_loss"):
            assert record[name] == pytest.approx(expected[name], rel=1e-4)
    for (_, found), (_, drawn) in zip(main, seen[1], strict=True):
        for (sample, latents), (expected_sample, expected_latents) in zip(found, drawn, strict=True):
            assert sample == expected_sample
            torch.testing.assert_close(latents, expected_latents, rtol=1e-3, atol=1e-3)


def test_looking_changes_nothing(dataset: Path, seen: tuple[Path, Written], tmp_path: Path) -> None:
    alone(config(dataset, tmp_path, validation={"share": 0.5, "clips": 1, "timesteps": [0.5]}))
    looking, blind = (read_records(output / "metrics.jsonl") for output in (seen[0], tmp_path))
    assert len(looking) == 3
    assert [r["loss"] for r in looking] == [r["loss"] for r in blind]
    assert [r["grad_norm"] for r in looking] == [r["grad_norm"] for r in blind]


STAGES = [
    {"name": "first", "steps": 2, "lr": {"peak": 3e-3}},
    {"name": "second", "steps": 2, "lr": {"peak": 3e-3}},
]


def test_a_stop_before_a_look_costs_neither_numbers_nor_samples(dataset: Path, tmp_path: Path) -> None:
    """Told in the last step of a stage, in one with a look, and in the last of all."""
    looks = {"share": 0.5, "every": 3, "samples": 1, "sample_steps": 1, "timesteps": [0.5], "guidance": 1.0}
    settings = config(dataset, tmp_path / "a", stages=STAGES, validation=looks)
    expected = alone(settings)
    assert [folder for folder, _ in expected] == [f"samples/step-00000{n}" for n in (2, 3, 4)]
    stopped = config(dataset, tmp_path / "b", stages=STAGES, validation=looks)
    written: Written = []
    for step, after in ((2, 2), (3, 1), (4, 1)):
        written += on_two_ranks(run_and_stop, stopped, after)[0]
        assert find_checkpoint(tmp_path / "b").step == step
        assert [record["step"] for record in validations(tmp_path / "b")] == list(range(2, step))
        assert to_do(stopped, ranks=2)
    written += on_two_ranks(run, stopped)[0]
    assert not to_do(stopped, ranks=2)
    assert on_two_ranks(run, stopped)[0] == []
    for found, wanted in zip(validations(tmp_path / "b"), validations(tmp_path / "a"), strict=True):
        assert (found["step"], found["stage"]) == (wanted["step"], wanted["stage"])
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    for (folder, samples), (also, drawn) in zip(written, expected, strict=True):
        assert folder == also
        torch.testing.assert_close(samples[0][1], drawn[0][1], rtol=1e-3, atol=1e-3)


class Killed(BaseException):
    """As by kill -9: nothing is cleaned up that a `finally` of the loop would not."""


def test_a_kill_in_a_look_costs_nothing(dataset: Path, tmp_path: Path) -> None:
    """What is looked at is saved, and neither numbers nor samples of a look count before it is over."""
    settings = config(dataset, tmp_path, checkpoint={"every": 99})

    class Killing(Noted):
        def write(self, folder: Path, samples: Sequence[Sample]) -> None:
            raise Killed

    with pytest.raises(Killed), join(Member.alone(), settings.mesh, deterministic=True) as world:
        run(world, settings, Killing())
    assert find_checkpoint(tmp_path).step == 2
    assert validations(tmp_path) == []
    assert [folder for folder, _ in alone(settings)] == ["samples/step-000002", "samples/step-000003"]


def test_a_stop_during_a_look_begins_no_further_stage(dataset: Path, tmp_path: Path) -> None:
    settings = config(dataset, tmp_path, stages=STAGES)

    class Stopping(Noted):
        def write(self, folder: Path, samples: Sequence[Sample]) -> None:
            super().write(folder, samples)
            signal.raise_signal(signal.SIGUSR1)

    with join(Member.alone(), settings.mesh, deterministic=True) as world:
        run(world, settings, Stopping())
    assert len(read_records(tmp_path / "metrics.jsonl")) == 2
    assert [folder for folder, _ in alone(settings)] == ["samples/step-000004"]
    assert [record["step"] for record in validations(tmp_path)] == [2, 4]


def test_a_stop_during_a_look_or_a_save_begins_no_further_step(dataset: Path, tmp_path: Path) -> None:
    stages = [STAGES[0] | {"steps": 5}]
    looks = {"share": 0.5, "every": 2, "timesteps": [0.5]}
    settings = config(dataset, tmp_path / "look", stages=stages, validation=looks)
    assert on_two_ranks(run_and_stop_in, settings, Looks, "take")[0] == [1, 2]
    assert [record["step"] for record in validations(tmp_path / "look")] == [2]
    on_two_ranks(run_and_stop, settings, 2)  # before the look after step 4, which is owed
    assert on_two_ranks(run_and_stop_in, settings, Looks, "take")[0] == [1, 2, 3, 4]
    assert [record["step"] for record in validations(tmp_path / "look")] == [2, 4]
    every = config(dataset, tmp_path / "save", stages=stages, validation={}, checkpoint={"every": 3})
    assert on_two_ranks(run_and_stop_in, every, Saver, "save")[0] == [1, 2, 3]
    assert find_checkpoint(tmp_path / "save").step == 3


def test_runs_of_all_seeds_are_held_against_the_same_clips_and_noise(dataset: Path, tmp_path: Path) -> None:
    """Random weights predict 0, so only clips, noise and noise levels make the number."""
    still = [{"name": "only", "steps": 1, "lr": {"peak": 0.0}}]
    for seed in (0, 1):
        alone(config(dataset, tmp_path / str(seed), seed=seed, stages=still))
    one, other = (validations(tmp_path / str(seed))[0] for seed in (0, 1))
    assert one["loss_by_timestep"] == other["loss_by_timestep"]
    first, second = (read_records(tmp_path / str(seed) / "metrics.jsonl")[0] for seed in (0, 1))
    assert first["loss"] != second["loss"]


def test_a_stage_does_not_hold_the_model_of_the_one_before(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []

    def watching(*args: Any) -> PackedModel:
        left.append(sum(parameter() is not None for parameter in made))
        return build_model(*args)

    def noting(model: PackedModel, *args: Any, **kwargs: Any) -> None:
        fill(model, *args, **kwargs)
        made.extend(weakref.ref(parameter) for parameter in model.parameters())

    monkeypatch.setattr(stage_model, "build_model", watching)
    monkeypatch.setattr(stage_model, "fill", noting)
    gc.disable()  # which might else come at the right time
    try:
        alone(config(dataset, tmp_path, stages=STAGES))
    finally:
        gc.enable()
    assert left == [0, 0]
    assert len(made) > 20


@pytest.mark.parametrize(
    "error", [RunError("out of memory"), OSError("disk full"), ValueError("no such codec")]
)
def test_pictures_that_fail_are_told_and_stop_nothing(error: Exception, tmp_path: Path) -> None:
    class Pictures:
        def write(self, folder: Path, samples: Sequence[Sample]) -> None:
            raise error

    assert f"{type(error).__name__}: {error}" in show(Pictures(), tmp_path, [])
    assert show(Noted(), tmp_path / "samples" / "step", []) == f"samples: {tmp_path / 'samples' / 'step'}"


def test_the_schedule_that_is_exported_is_that_of_the_objective(dataset: Path, tmp_path: Path) -> None:
    alone(config(dataset, tmp_path / "run", validation={}))
    export(find_checkpoint(tmp_path / "run"), tmp_path / "out")
    schedule = read_schedule(tmp_path / "out" / "scheduler" / "scheduler_config.json")
    assert (schedule.objective, schedule.shift) == ("flow", 2.0)
