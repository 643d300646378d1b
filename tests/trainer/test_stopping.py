"""When training stops before its end: by signals, its own time limit, Slurm's; nothing is lost by it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.train_config import CheckpointConfig, TrainConfig
from tests.trainer.datasets import write_dataset
from tests.trainer.gloo import on_ranks
from tests.trainer.test_loop import config, losses, run, run_and_stop, saved_bytes
from tests.trainer.test_parallel import alone
from trainer import loop, sharding
from trainer.checkpoint import checkpoints_folder, find_checkpoint
from trainer.parallel import World
from trainer.stopping import CTRL_C, SLURM_END, STOP_SIGNALS, ask, stopping


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


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[Any], None]]:
    """Sets what Ctrl-C does, for the time of a test."""
    before = signal.getsignal(signal.SIGINT)

    def set_to(handler: Any) -> None:
        signal.signal(signal.SIGINT, handler)

    yield set_to
    signal.signal(signal.SIGINT, before)


def test_the_first_ctrl_c_of_training_stops_and_the_second_interrupts(
    ctrl_c: Callable[[Any], None], capfd: pytest.CaptureFixture[str]
) -> None:
    ctrl_c(signal.default_int_handler)
    with stopping(CheckpointConfig()) as state:
        with pytest.raises(KeyboardInterrupt):  # no step has begun
            signal.raise_signal(signal.SIGINT)
        assert not state.told
        state.begin(tell=True)
        state.begin(tell=True)  # of the next stage
        signal.raise_signal(signal.SIGINT)
        assert (state.told, state.interrupted, state.reason) == (True, True, "by SIGINT")
        assert capfd.readouterr().err == CTRL_C
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_rank_of_a_launcher_leaves_the_second_ctrl_c_to_it(
    ctrl_c: Callable[[Any], None], capfd: pytest.CaptureFixture[str]
) -> None:
    ctrl_c(signal.SIG_DFL)
    with stopping(CheckpointConfig()) as state:
        state.begin(tell=True)
        signal.raise_signal(signal.SIGINT)  # one Ctrl-C, from the terminal and from the launcher
        signal.raise_signal(signal.SIGINT)
        assert state.received == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert capfd.readouterr().err == ""


def test_an_ignored_ctrl_c_stays_ignored(ctrl_c: Callable[[Any], None]) -> None:
    ctrl_c(signal.SIG_IGN)  # as in the background of a script
    with stopping(CheckpointConfig()) as state:
        state.begin(tell=True)
        signal.raise_signal(signal.SIGINT)
        assert not state.told


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


def test_another_thread_has_limits_and_is_asked_instead_of_signalled() -> None:
    told: list[bool | str] = []

    def work() -> None:
        with stopping(CheckpointConfig(time_limit_s=1e-9, time_margin_s=0.0)) as state:
            told.append(state.told)
        with stopping(CheckpointConfig()) as state:
            told.extend([state.told, ask(signal.SIGTERM), state.told, state.reason])
        told.append(ask(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert told == [True, False, True, True, "by SIGTERM", False]


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


def test_ctrl_c_costs_nothing_and_is_raised_once_all_is_saved(
    dataset: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(dataset, tmp_path, stages=STEPS, data=SLOTS, checkpoint={"every": 9, "keep": 9})
    clip_grad_norm = sharding.clip_grad_norm

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return clip_grad_norm(*args, **kwargs)

    monkeypatch.setattr(loop, "clip_grad_norm", interrupted)
    for step in range(1, 4):
        with pytest.raises(KeyboardInterrupt):
            alone(run, settings)
        assert find_checkpoint(tmp_path).step == step
    assert [step for step, *_ in losses(tmp_path)] == [1, 2, 3]
    for found, expected in zip(losses(tmp_path), losses(undisturbed), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
