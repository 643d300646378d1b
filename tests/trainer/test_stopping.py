"""When training stops before its end: by signals, its own time limit, Slurm's; nothing is lost by it."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest

from schemas.train_config import CheckpointConfig, TrainConfig
from tests.trainer.datasets import write_dataset
from tests.trainer.gloo import on_ranks
from tests.trainer.test_loop import config, losses, run, run_and_stop, saved_bytes
from trainer.checkpoint import checkpoints_folder, find_checkpoint
from trainer.parallel import World
from trainer.stopping import SLURM_END, STOP_SIGNALS, stopping


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SLURM_END, raising=False)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_the_handler_of_before_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stopping(CheckpointConfig()) as state:
        assert not state.told
        signal.raise_signal(number)
        assert state.told
        assert state.reason == f"by {number.name}"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("limit_s", "slurm_s", "reason"),
    [
        (100.0, None, "before checkpoint.time_limit_s"),
        (0.0, 100, "before the end of the Slurm job"),
        (100.0, 500, "before checkpoint.time_limit_s"),
        (500.0, 100, "before the end of the Slurm job"),
    ],
)
def test_no_step_begins_in_the_margin_before_the_earlier_limit(
    monkeypatch: pytest.MonkeyPatch, limit_s: float, slurm_s: int | None, reason: str
) -> None:
    now = 1_700_000_000.0
    monkeypatch.setattr("trainer.stopping.time.time", lambda: now)
    if slurm_s is not None:
        monkeypatch.setenv(SLURM_END, str(int(now) + slurm_s))
    with stopping(CheckpointConfig(time_limit_s=limit_s, time_margin_s=30.0)) as state:
        now += 69.0
        assert not state.told
        now += 1.0
        assert state.told
        assert state.reason == reason


def test_no_step_begins_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_700_000_000.0
    monkeypatch.setattr("trainer.stopping.time.time", lambda: now)
    with stopping(CheckpointConfig(time_limit_s=100.0, time_margin_s=30.0)) as state:
        state.took(40.0)
        for _ in range(19):
            state.took(1.0)
        now += 29.0
        assert not state.told
        now += 1.0
        assert state.told
        assert state.reason == "before checkpoint.time_limit_s"
        state.took(1.0)  # the first step, which compiles, is forgotten
        assert not state.told


def test_a_limit_within_its_margin_is_refused() -> None:
    with pytest.raises(ValueError, match=r"time_limit_s = 60 leaves no time to train: .*time_margin_s, 60 s"):
        CheckpointConfig(time_limit_s=60.0, time_margin_s=60.0)


def test_without_a_limit_there_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SLURM_END, "not a number")
    with stopping(CheckpointConfig()) as state:
        later = time.time() + 1e9
        monkeypatch.setattr("trainer.stopping.time.time", lambda: later)
        assert not state.told


def test_another_thread_has_limits_but_no_signals() -> None:
    told = []

    def work() -> None:
        with stopping(CheckpointConfig(time_limit_s=1e-9, time_margin_s=0.0)) as state:
            told.append(state.told)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert told == [True]


STEPS = [{"name": "only", "steps": 3, "lr": {"peak": 3e-3, "warmup": 2}}]
SLOTS = {"budget_tokens": 64, "slots": 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of three steps on three ranks."""
    output = tmp_path_factory.mktemp("undisturbed")
    on_ranks(3, run, config(dataset, output, stages=STEPS, data=SLOTS))
    return output


def run_to_a_limit(world: World, config: TrainConfig) -> None:
    """Only the last rank's time is over, as soon as it has begun."""
    limit = {"time_limit_s": 1e-9 if world.rank == 2 else 0.0, "time_margin_s": 0.0}
    run(world, config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=limit)}))


def test_a_time_limit_of_one_rank_ends_all_after_the_same_step_and_costs_nothing(
    dataset: Path, undisturbed: Path, tmp_path: Path
) -> None:
    settings = config(dataset, tmp_path, stages=STEPS, data=SLOTS)
    for step in range(1, 4):
        on_ranks(3, run_to_a_limit, settings)
        assert find_checkpoint(tmp_path).step == step
        assert find_checkpoint(tmp_path).meta["stopped"]
    assert losses(tmp_path) == losses(undisturbed)
    assert saved_bytes(tmp_path) == saved_bytes(undisturbed)
    assert len(saved_bytes(tmp_path)) == 3


def test_a_signal_to_one_of_three_ranks_costs_nothing(
    dataset: Path, undisturbed: Path, tmp_path: Path
) -> None:
    settings = config(dataset, tmp_path, stages=STEPS, data=SLOTS, checkpoint={"every": 9, "keep": 9})
    on_ranks(3, run_and_stop, settings, 2)
    assert [path.name for path in checkpoints_folder(tmp_path).glob("step-*")] == ["step-000002"]
    on_ranks(3, run, settings)
    assert losses(tmp_path) == losses(undisturbed)
    assert saved_bytes(tmp_path) == saved_bytes(undisturbed)
