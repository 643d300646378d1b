"""`latentpress submit --slurm`: a config in, a Slurm job out that trains, queued again until it is done.

Every task of the job is one rank and runs what `latentpress train` runs under torchrun. Shortly before the
job's end Slurm signals: training finishes its step, saves and returns, and submitit puts the job back into
the queue, where it resumes. Logs and the job's settings, fixed when it is submitted, go to `<output>/slurm`.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.train import run_config, to_do, train_here
from schemas.errors import EXIT_DONE, ConfigError, RunError
from schemas.train_config import TrainConfig

if TYPE_CHECKING:
    import submitit

_SIGNAL = "USR1"
_SIGNAL_SETTING = "SUBMITIT_PREEMPT_SIGNAL"
"""Where submitit reads the signal before a job's end from; it takes another one where nothing is set."""
_REQUEUES = 10_000
"""Of one job. submitit wants a bound; a run has one itself, as each time it makes a step at least."""


@dataclass(frozen=True)
class SlurmOptions:
    """What is asked of Slurm."""

    nodes: int = 1
    gpus_per_node: int = 1
    """One rank each; 0: one rank a node, on CPUs."""
    cpus_per_task: int = 8
    time_min: int = 240
    """Longest time of one job, in minutes; the run takes as many jobs as it needs."""
    partition: str | None = None
    account: str | None = None
    sbatch: Mapping[str, str] | None = None
    """Other options of sbatch, by name."""

    @property
    def ranks(self) -> int:
        return self.nodes * max(1, self.gpus_per_node)


@dataclass(frozen=True)
class TrainJob:
    """What each task of a job runs; submitit pickles it."""

    config: TrainConfig

    def __call__(self) -> None:
        """One rank of the run. Where something is left to do at its end, the job is queued again."""
        from submitit.helpers import TorchDistributedEnvironment

        from trainer.checkpoint import checkpoints_folder, newest
        from trainer.resume import is_finished

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        # submitit listens for the signal up to the first step, then training does, then submitit again.
        train_here(self.config)
        saved = newest(checkpoints_folder(Path(self.config.output)))
        if saved is not None and not is_finished(self.config, saved):
            signal.raise_signal(signal.SIGUSR1)

    def checkpoint(self) -> Any:
        """For submitit: the job to queue again is this one."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit_slurm(
    config_path: str | Path, *, overrides: Sequence[str], stage: str | None, options: SlurmOptions
) -> int:
    """Submit the run of a config; returns the exit code."""
    if missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
        raise ConfigError(
            f"--slurm: found no {' and no '.join(missing)}; run this on a login node of the cluster"
        )
    config = run_config(config_path, overrides=overrides, stage=stage)
    if 60 * options.time_min <= (margin := config.checkpoint.time_margin_s):
        raise ConfigError(
            f"--time {options.time_min} leaves no time to train: expected more minutes than "
            f"checkpoint.time_margin_s, {margin:g} s, which is kept for the last save"
        )
    if to_do(config, ranks=options.ranks):
        job = submit(config, options=options, cluster="slurm")
        print(f"submitted job {job.job_id}: {options.ranks} ranks; log {job.paths.stdout}")
    return EXIT_DONE


def sbatch_options(given: Sequence[str]) -> dict[str, str]:
    """Options of sbatch from NAME=VALUE; ConfigError where one has no value."""
    options = dict(option.partition("=")[::2] for option in given)
    if wrong := [name for name, value in options.items() if not name or not value]:
        raise ConfigError(f"--sbatch: expected NAME=VALUE, as qos=high; found {', '.join(wrong)}")
    return options


def submit(
    config: TrainConfig, *, options: SlurmOptions, cluster: Literal["slurm", "local"]
) -> submitit.Job[None]:
    """Hand the run to submitit; `local` runs it here, as one node does."""
    os.environ[_SIGNAL_SETTING] = _SIGNAL  # before the import, which reads it
    import submitit
    from submitit.core.utils import FailedJobError

    folder = Path(config.output).resolve() / "slurm"
    executor = submitit.AutoExecutor(
        folder, cluster=cluster, slurm_max_num_timeout=_REQUEUES, local_max_num_timeout=_REQUEUES
    )
    executor.update_parameters(
        name=Path(config.output).name,
        nodes=options.nodes,
        tasks_per_node=max(1, options.gpus_per_node),
        gpus_per_node=options.gpus_per_node,
        cpus_per_task=options.cpus_per_task,
        timeout_min=options.time_min,
        stderr_to_stdout=True,
        slurm_partition=options.partition,
        slurm_account=options.account,
        slurm_signal_delay_s=round(config.checkpoint.time_margin_s),
        slurm_setup=[f"export {_SIGNAL_SETTING}={_SIGNAL}"],
        # Ranks wait for each other: where one fails, the others must not wait for ever.
        slurm_srun_args=["--kill-on-bad-exit=1"],
        slurm_additional_parameters={"requeue": True, **(options.sbatch or {})},
    )
    try:
        return executor.submit(TrainJob(config))
    except (FailedJobError, OSError) as error:
        raise RunError(f"sbatch took no job: {error}") from error
