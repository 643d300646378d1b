"""The loop looks at what it trains: the same numbers and samples however many ranks there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.load import check_config
from schemas.train_config import TrainConfig
from tests.trainer.datasets import write_dataset
from tests.trainer.gloo import on_two_ranks
from trainer import loop
from trainer.checkpoint import find_checkpoint
from trainer.export import export
from trainer.metrics import read_records
from trainer.objective import read_schedule
from trainer.parallel import Member, World, join
from trainer.sample import Sample

Written = list[tuple[str, list[tuple[str, torch.Tensor]]]]
"""Folder, then sample id and latents of each."""


class Noted:
    """Pictures that only remember."""

    def __init__(self) -> None:
        self.written: Written = []

    def write(self, folder: Path, samples: Sequence[Sample]) -> None:
        found = [(sample.reference.sample_id, sample.latents) for sample in samples]
        self.written.append((folder.relative_to(folder.parents[1]).as_posix(), found))


def run(world: World, config: TrainConfig) -> Written:
    pictures = Noted()
    Path(config.output).mkdir(parents=True, exist_ok=True)
    loop.train(config, world=world, pictures=pictures)
    return pictures.written


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


def test_the_schedule_that_is_exported_is_that_of_the_objective(dataset: Path, tmp_path: Path) -> None:
    alone(config(dataset, tmp_path / "run", validation={}))
    export(find_checkpoint(tmp_path / "run"), tmp_path / "out")
    schedule = read_schedule(tmp_path / "out" / "scheduler" / "scheduler_config.json")
    assert (schedule.objective, schedule.shift) == ("flow", 2.0)
