"""Training on a cluster: what Slurm is given, a job that queues itself again, torchrun, and Ray Train."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.submit import SlurmOptions, sbatch_options, submit, submit_slurm
from jobs.train import run_config
from schemas.errors import ConfigError, RunError
from tests.jobs.test_train import REPOSITORY, config_file
from tests.trainer.datasets import write_dataset
from trainer.checkpoint import checkpoints_folder, find_checkpoint
from trainer.metrics import read_records

SBATCH = """#!/bin/sh
cp "$1" "{folder}/script"
echo "Submitted batch job 123"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submit")
    write_dataset(folder / "set")
    return folder


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A login node: its `sbatch` keeps the script."""
    for name, text in (("sbatch", SBATCH.format(folder=tmp_path)), ("srun", "#!/bin/sh\n")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


def test_slurm_is_told_all_and_signals_when_training_listens(
    folder: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = SlurmOptions(
        nodes=2,
        gpus_per_node=4,
        cpus_per_task=6,
        time_min=90,
        partition="long",
        account="lab",
        sbatch=sbatch_options(["qos=high", "exclude=node1,node2"]),
    )
    overrides = [f"output={cluster}/run", "checkpoint.time_margin_s=45", "data.slots=8"]
    assert submit_slurm(config_file(folder, steps=3), overrides=overrides, stage=None, options=options) == 0
    assert f"submitted job 123: 8 ranks; log {cluster}/run/slurm/123_0_log.out" in capsys.readouterr().out
    script = (cluster / "script").read_text()
    for line in (
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=6",
        "--time=90",
        "--partition=long",
        "--account=lab",
        "--qos=high",
        "--exclude=node1,node2",
        "--signal=USR1@45",
        "--requeue",
        "--job-name=run",
    ):
        assert f"\n#SBATCH {line}\n" in script
    assert "\nexport SUBMITIT_PREEMPT_SIGNAL=USR1\n" in script
    assert re.search(r"\nsrun .*--kill-on-bad-exit=1 .*submitit.core._submit", script)


def test_what_cannot_train_is_refused_before_it_waits_in_a_queue(folder: Path, cluster: Path) -> None:
    path, options = config_file(folder, steps=3), SlurmOptions(nodes=2, gpus_per_node=4)
    with pytest.raises(ConfigError, match="must be the number of ranks, found 8; start with --nproc 3"):
        submit_slurm(path, overrides=["mesh.dp_replicate=3"], stage=None, options=options)
    with pytest.raises(ConfigError, match=r"--time 2 leaves no time to train: .*time_margin_s, 120 s"):
        submit_slurm(path, overrides=[], stage=None, options=SlurmOptions(time_min=2))
    with pytest.raises(ConfigError, match=r"--sbatch: expected NAME=VALUE, as qos=high; found qos"):
        sbatch_options(["qos"])
    assert not (cluster / "script").exists()


def test_a_submission_that_slurm_refuses_is_one_error(folder: Path, cluster: Path) -> None:
    (cluster / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    with pytest.raises(RunError, match=r"(?s)sbatch took no job: .*invalid partition"):
        submit_slurm(
            config_file(folder, steps=3),
            overrides=[f"output={cluster}/run"],
            stage=None,
            options=SlurmOptions(),
        )


def test_without_slurm_it_says_where_to_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="found no sbatch and no srun; run this on a login node"):
        submit_slurm(config_file(folder, steps=3), overrides=[], stage=None, options=SlurmOptions())


@pytest.mark.slow
def test_a_job_that_runs_out_of_time_is_queued_again_until_the_run_is_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through submitit's own local cluster; no step's time is long enough for two."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    limits = ["checkpoint.time_limit_s=1e-9", "checkpoint.time_margin_s=0"]
    overrides = [f"output={tmp_path}/run", *limits]
    config = run_config(config_file(folder, steps=2), overrides=overrides, stage=None)
    job = submit(config, options=SlurmOptions(gpus_per_node=2, time_min=10), cluster="local")
    assert job.exception() is None, job.stdout()
    log = job.stdout() or ""
    assert log.count("requeue me") == log.count("Requeued job") == 1
    assert "resuming after step 1" in log
    assert find_checkpoint(tmp_path / "run").meta["mesh"]["ranks"] == 2
    assert [r["step"] for r in read_records(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in r] == [1, 2]


@pytest.mark.slow
def test_torchrun_starts_the_same_run(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "jobs.cli",
        "train",
        str(config_file(folder, steps=2)),
        "--set",
        f"output={tmp_path}/run",
    ]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("finished: 2 steps") == 1
    assert find_checkpoint(tmp_path / "run").meta["mesh"]["ranks"] == 2


def _terminated_at_a_step(run: Path) -> None:
    """This process, once a run has made its first step."""
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_train_runs_it_on_its_workers_and_hands_errors_back(folder: Path, tmp_path: Path) -> None:
    import ray

    from jobs.ray_train import fit, submit_ray

    path = config_file(folder, steps=2)
    with pytest.raises(ConfigError, match=r"--ray = 'localhost:1': nothing answers there .*refused"):
        submit_ray(path, overrides=[], stage=None, address="localhost:1", workers=2)
    cluster: Any = ray.init(
        address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False
    )
    try:
        fit(run_config(path, overrides=[f"output={tmp_path}/run"], stage=None), workers=2)
        saved = find_checkpoint(tmp_path / "run")
        assert (saved.step, saved.meta["mesh"]["ranks"]) == (2, 2)
        logs = (Path(cluster.address_info["session_dir"]) / "logs").glob("worker-*")
        assert sum(log.read_text().count("finished: 2 steps") for log in logs) == 1
        wrong = run_config(
            path, overrides=[f"output={tmp_path}/wrong", "model.attention=flash_attn_3"], stage=None
        )
        with pytest.raises(RunError, match=r"model\.attention = 'flash_attn_3'"):
            fit(wrong, workers=1)
        assert not checkpoints_folder(tmp_path / "wrong").exists()
        told, before = tmp_path / "told", signal.getsignal(signal.SIGTERM)
        threading.Thread(target=_terminated_at_a_step, args=(told,), daemon=True).start()
        fit(run_config(path, overrides=[f"output={told}", "stages.0.steps=1000000"], stage=None), workers=1)
        assert find_checkpoint(told).step == max(
            record["step"] for record in read_records(told / "metrics.jsonl")
        )
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        ray.shutdown()
