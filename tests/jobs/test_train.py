"""`latentpress train` and its launcher: ranks as processes, one error, stop signals, nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from jobs.launcher import _rank
from jobs.train import check, export_model, train
from schemas.errors import ConfigError, RunError
from schemas.load import load_config
from schemas.train_config import TrainConfig
from tests.trainer.datasets import write_dataset
from trainer.check import LOSS_GATE
from trainer.checkpoint import find_checkpoint
from trainer.metrics import read_records
from trainer.parallel import World
from trainer.stopping import CTRL_C

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = """
dataset = "{folder}/set"
output = "{folder}/run"
model = {{ num_attention_heads = 1, attention_head_dim = 16, time_embed_dim = 16, num_layers = 1 }}
data = {{ budget_tokens = 64, slots = 2 }}
checkpoint = {{ every = 5, keep = 2 }}
[[stages]]
name = "only"
steps = {steps}
lr = {{ peak = 1e-3 }}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_dataset(folder / "set")
    return folder


def config_file(folder: Path, *, steps: int) -> Path:
    path = folder / "train.toml"
    path.write_text(TEXT.format(folder=folder, steps=steps))
    return path


Start = Callable[[Path], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a launcher of two ranks; what a test that fails leaves running is ended."""
    started: list[subprocess.Popen[str]] = []

    def launcher(path: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "train", str(path), "--nproc", "2"],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield launcher
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(holds: Callable[[], bool], what: str) -> None:
    for _ in range(2400):  # a busy machine takes minutes to import torch three times
        if holds():
            return
        time.sleep(0.1)
    raise TimeoutError(what)


def gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def newest_step(folder: Path) -> int:
    latest = folder / "run" / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else 0


def test_a_check_says_what_to_do_and_nothing_of_a_folder_that_is_gone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(folder, steps=3)
    assert check(path, overrides=[f"output={tmp_path}/run"], stage=None) == 0
    said = capsys.readouterr()
    assert "1/1" in said.err  # the one step is shown
    assert "stage only: 1 step;" in said.err
    assert "finished" not in said.out + said.err
    assert "FAILED" not in said.out
    rows = said.out.splitlines()
    monkeypatch.setitem(LOSS_GATE, "float32", -1.0)
    assert check(path, overrides=[f"output={tmp_path}/run"], stage=None) == 3
    [advice] = capsys.readouterr().out.splitlines()[len(rows) :]
    assert advice.startswith("loss of the first step, from the exported weights: where param")


def test_one_rank_trains_here_resumes_finishes_and_exports(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(folder, steps=3)
    output = f"output={tmp_path}/run"
    assert train(path, overrides=[output]) == 0
    assert "finished: 3 steps" in capsys.readouterr().out
    written = load_config(tmp_path / "run" / "config.toml", TrainConfig)
    assert written == load_config(path, TrainConfig, overrides=[output])
    assert train(path, overrides=[output]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert train(path, overrides=[output, "stages.0.steps=5"]) == 0
    assert "resuming after step 3" in capsys.readouterr().out
    starts = read_records(tmp_path / "run" / "metrics.jsonl", kind="start")
    assert [start["changes"] for start in starts] == [[], ["stages.0.steps: 3 -> 5"]]
    assert export_model(tmp_path / "run", tmp_path / "out") == 0
    assert "(step 5)" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").is_file()
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match="seed: checkpoint 0, config 7"):
        train(path, overrides=[output, "seed=7"])
    with pytest.raises(RunError, match=r"model\.attention = 'flash_attn_3'"):  # known late
        train(path, overrides=[output, "stages.0.steps=6", "model.attention=flash_attn_3"])
    assert (tmp_path / "run" / "config.toml").read_bytes() == before
    (tmp_path / "run" / "loss.png").unlink()
    assert train(path, overrides=[output, "stages.0.steps=5"]) == 0
    assert (tmp_path / "run" / "loss.png").is_file()


def test_a_failing_rank_is_one_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.slots = 3: expected a multiple of the 2 data-parallel ranks"
    ):
        train(config_file(folder, steps=3), overrides=[f"output={tmp_path}/run", "data.slots=3"], nproc=2)


def told_to_stop(*args: object) -> None:
    """A rank that is still importing when its launcher is told to stop."""
    time.sleep(1)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)


def test_a_stop_before_the_first_step_is_no_failure(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.launcher._rank", told_to_stop)
    assert train(config_file(folder, steps=3), overrides=[f"output={tmp_path}/run"], nproc=2) == 0
    assert "stopped before the first step" in capsys.readouterr().out


def interrupted_before_a_step(rank: int, *args: object) -> None:
    """As from a terminal: launcher and rank get it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if rank == 0:
        for pid in (os.getppid(), os.getpid()):
            os.kill(pid, signal.SIGINT)
    time.sleep(60)


def interrupted_twice(rank: int, *args: object) -> None:
    """While a step takes long, as the rank hears of it only then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if rank == 0:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(1)
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)


@pytest.mark.parametrize("rank", [interrupted_before_a_step, interrupted_twice])
def test_ctrl_c_before_the_first_step_and_a_second_one_end_at_once(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    rank: Callable[..., None],
) -> None:
    monkeypatch.setattr("jobs.launcher._rank", rank)
    with pytest.raises(RunError, match="interrupted; nothing is saved: run again to start anew"):
        train(config_file(folder, steps=3), overrides=[f"output={tmp_path}/run"], nproc=2)
    assert capfd.readouterr().err.count(CTRL_C) == 1
    assert not [each for each in multiprocessing.active_children() if each.name.startswith("rank ")]


def test_an_interrupted_run_says_where_it_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import loop, sharding

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return sharding.clip_grad_norm(*args, **kwargs)

    path, output = config_file(folder, steps=2), [f"output={tmp_path}/run"]
    monkeypatch.setattr(loop, "clip_grad_norm", interrupted)
    with pytest.raises(RunError, match=r"step-000001 is whole: run again to go on after step 1"):
        train(path, overrides=output)
    with pytest.raises(RunError, match=r"interrupted; .*step-000002 has all 2 steps"):
        train(path, overrides=output)
    assert train(path, overrides=output) == 0


def fails_while_others_wait(rank: int, *args: Any) -> None:
    """One rank fails, its peer waits for it; and ending a process group waits too, as it does with NCCL."""

    def run(config: TrainConfig, *, world: World, pictures: object) -> None:
        if world.rank == 1:
            raise RunError("rank 1 has had enough")
        world.barrier()

    patch = pytest.MonkeyPatch()
    patch.setattr("trainer.loop.train", run)
    patch.setattr("torch.distributed.destroy_process_group", lambda: time.sleep(600))
    _rank(rank, *args)


def test_a_rank_that_fails_alone_ends_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.launcher._rank", fails_while_others_wait)
    with pytest.raises(RunError, match="rank 1 has had enough"):
        train(config_file(folder, steps=3), overrides=[f"output={tmp_path}/run"], nproc=2)
    assert not [each for each in multiprocessing.active_children() if each.name.startswith("rank ")]


def fails_and_is_told_to_stop(
    rank: int, size: int, port: int, config: TrainConfig, sender: Connection
) -> None:
    sender.send((1, f"{config.output} is full"))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)


def test_a_failure_is_told_though_a_stop_follows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.launcher._rank", fails_and_is_told_to_stop)
    with pytest.raises(RunError, match="run is full"):
        train(config_file(folder, steps=3), overrides=[f"output={tmp_path}/run"], nproc=2)
    assert "requeue" not in capsys.readouterr().out


def told_to_stop_when_done(rank: int, *args: Any) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr("trainer.loop.train", lambda config, *, world, pictures: None)
    patch.setattr("torch.distributed.destroy_process_group", lambda: os.kill(os.getpid(), signal.SIGTERM))
    _rank(rank, *args)


def test_a_stop_after_the_last_step_is_no_stop(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.launcher._rank", told_to_stop_when_done)
    assert train(config_file(folder, steps=3), overrides=[f"output={tmp_path}/run"], nproc=2) == 0
    assert capsys.readouterr().out == ""


def test_a_rank_without_a_world_is_a_config_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="expected a number in WORLD_SIZE"):
        train(config_file(folder, steps=3), overrides=[f"output={tmp_path}/run"])


@pytest.mark.parametrize("change", ["optim.betas=[0.9, 1.0]", "model.attention_head_dim=24"])
def test_values_torch_would_refuse_are_config_errors(folder: Path, change: str) -> None:
    with pytest.raises(ConfigError, match=change.split("=")[0]):
        train(config_file(folder, steps=3), overrides=[change])


def test_one_stage_is_a_run_of_its_own(folder: Path, tmp_path: Path) -> None:
    path = config_file(folder, steps=3)
    path.write_text(path.read_text() + '[[stages]]\nname = "then"\nsteps = 2\nlr = { peak = 1e-3 }\n')
    assert train(path, overrides=[f"output={tmp_path}/run"], stage="then") == 0
    saved = find_checkpoint(tmp_path / "run" / "then")
    assert (saved.step, saved.meta["stage"]) == (2, "then")
    assert [each.name for each in (tmp_path / "run").iterdir()] == ["then"]
    with pytest.raises(ConfigError, match=r"--stage other: expected one of the stages .*: only, then"):
        train(path, overrides=[f"output={tmp_path}/run"], stage="other")


def test_a_stage_of_another_mesh_names_its_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be the number of ranks, found 1; start with --nproc 2"):
        train(config_file(folder, steps=3), overrides=[f"output={tmp_path}/run", "stages.0.mesh.tp=2"])
    assert not (tmp_path / "run").exists()


def test_a_time_limit_ends_a_run_well(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = [f"output={tmp_path}/run", "checkpoint.time_limit_s=1e-9", "checkpoint.time_margin_s=0"]
    assert train(config_file(folder, steps=3), overrides=limits) == 0
    assert "stopped before checkpoint.time_limit_s" in (out := capsys.readouterr().out)
    assert "run the same command again to go on (requeue me)" in out
    assert find_checkpoint(tmp_path / "run").step == 1


@pytest.mark.slow
def test_a_signal_ends_two_ranks_after_a_save_and_a_kill_leaves_none(folder: Path, start: Start) -> None:
    path = config_file(folder, steps=100_000)
    first = start(path)
    wait_until(lambda: newest_step(folder) > 0, "no checkpoint")
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=90)
    assert first.returncode == 0, out
    assert "run the same command again to go on (requeue me)" in out
    wait_until(lambda: gone(first.pid), "ranks outlived their stopped launcher")
    done = newest_step(folder)
    second = start(path)
    wait_until(lambda: newest_step(folder) > done, "no later checkpoint")
    second.kill()
    out, _ = second.communicate(timeout=90)
    assert f"resuming after step {done} " in out
    wait_until(lambda: gone(second.pid), "ranks outlived their killed launcher")


@pytest.mark.slow
def test_ctrl_c_is_a_stop_and_the_last_line_says_what_is_saved(folder: Path, start: Start) -> None:
    path = config_file(folder, steps=100_000)
    before = newest_step(folder)
    process = start(path)
    wait_until(lambda: newest_step(folder) > before, "no checkpoint")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the launcher and its ranks
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 1, out
    done = newest_step(folder)
    assert read_records(folder / "run" / "metrics.jsonl")[-1]["step"] == done
    assert f"run again to go on after step {done}" in out.splitlines()[-1]
    assert out.count("Ctrl-C: ") == 1
    assert "Traceback" not in out
    wait_until(lambda: gone(process.pid), "ranks outlived their stopped launcher")
