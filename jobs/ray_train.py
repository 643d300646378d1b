"""`latentpress submit --ray`: a config in, the run on the workers of a Ray cluster; waits for its end.

Ray Train starts one process per GPU, makes their process group and watches over them; training is what
`latentpress train` runs under torchrun. Checkpoints and metrics go to the run's output, which all nodes see.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import ray
from ray.train import RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.train import run_config, to_do, train_here
from pipeline.ray_join import own_handler
from schemas.errors import EXIT_DONE, LatentpressError, RunError
from schemas.train_config import TrainConfig

_KNOCK_S = 5.0
_OWN_PRINT = "RAY_TRAIN_ENABLE_PRINT_PATCH"
"""Ray Train's own print() for its workers writes to a logger and to standard output, and both are shown. It
hands this setting on to them."""


def submit_ray(
    config_path: str | Path, *, overrides: Sequence[str], stage: str | None, address: str, workers: int
) -> int:
    """Train the run of a config on `workers` processes of the cluster at `address`; returns the exit code."""
    config = run_config(config_path, overrides=overrides, stage=stage)
    if not to_do(config, ranks=workers):
        return EXIT_DONE
    try:
        _knock(address)
        ray.init(address, ignore_reinit_error=True)
    except OSError as error:
        raise RunError(
            f"no Ray cluster at {address}: {error}; expected HOST:PORT as `ray start --head` prints it"
        ) from error
    fit(config, workers=workers)
    return EXIT_DONE


def _knock(address: str) -> None:
    """OSError where nothing listens at HOST:PORT; Ray itself would wait for it for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()


def fit(config: TrainConfig, *, workers: int) -> None:
    """Train on the cluster this process is connected to: on its GPUs, or where it has none on CPUs."""
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    here = os.getcwd()
    os.environ.setdefault(_OWN_PRINT, "0")

    def worker() -> None:
        os.chdir(here)  # Ray's own folder means nothing to the paths of a config
        train_here(config)

    trainer = TorchTrainer(
        worker,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        run_config=RunConfig(storage_path=str(Path(config.output).resolve()), name="ray"),
    )
    try:
        with own_handler(signal.SIGINT):
            trainer.fit()
    except TrainingFailedError as error:
        raise _cause(error) from error
    except SystemExit as error:  # how Ray ends on Ctrl-C, once its workers are gone: as if all was done
        raise KeyboardInterrupt from error


def _cause(error: TrainingFailedError) -> LatentpressError:
    """What the first failing rank had to say; the others follow from it."""
    if isinstance(error, WorkerGroupError):
        known = [
            failure for failure in error.worker_failures.values() if isinstance(failure, LatentpressError)
        ]
        if known:
            return known[0]
    return RunError(f"{error}\nthe checkpoints are whole, run again to resume")
