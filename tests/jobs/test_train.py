"""The launcher of `latentpress train`: ranks as processes, one error, stop signals, nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from jobs.train import _rank, export_model, train
from schemas.errors import ConfigError, RunError
from schemas.load import load_config
from schemas.train_config import TrainConfig
from tests.trainer.datasets import write_dataset
from trainer.checkpoint import find_checkpoint
from trainer.parallel import World

REPOSITORY = Path(__file__).resolve().parents[2]
START = "import sys; from jobs.train import train; sys.exit(train(sys.argv[1], nproc=int(sys.argv[2])))"
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


def start(path: Path, *, nproc: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START, str(path), str(nproc)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(holds: Callable[[], bool], what: str) -> None:
    for _ in range(900):
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
    monkeypatch.setattr("jobs.train._rank", told_to_stop)
    assert train(config_file(folder, steps=3), overrides=[f"output={tmp_path}/run"], nproc=2) == 0
    assert "stopped before the first step" in capsys.readouterr().out


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
    monkeypatch.setattr("jobs.train._rank", fails_while_others_wait)
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
    monkeypatch.setattr("jobs.train._rank", fails_and_is_told_to_stop)
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
    monkeypatch.setattr("jobs.train._rank", told_to_stop_when_done)
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
    assert "requeue me, the same command resumes" in out
    assert find_checkpoint(tmp_path / "run").step == 1


@pytest.mark.slow
def test_a_signal_ends_two_ranks_after_a_save_and_a_kill_leaves_none(folder: Path) -> None:
    path = config_file(folder, steps=100_000)
    first = start(path, nproc=2)
    wait_until(lambda: newest_step(folder) > 0, "no checkpoint")
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=90)
    assert first.returncode == 0, out
    assert "requeue me, the same command resumes" in out
    wait_until(lambda: gone(first.pid), "ranks outlived their stopped launcher")
    done = newest_step(folder)
    second = start(path, nproc=2)
    wait_until(lambda: newest_step(folder) > done, "no later checkpoint")
    second.kill()
    out, _ = second.communicate(timeout=90)
    assert f"resuming after step {done} " in out
    wait_until(lambda: gone(second.pid), "ranks outlived their killed launcher")
