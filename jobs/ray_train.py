"""`latentpress submit --ray`: a config in, the run on the workers of a Ray cluster; waits for its end.

Ray Train starts one process per GPU, makes their process group and watches over them; training is what
`latentpress train` runs under torchrun. Checkpoints and metrics go to the run's output, which all nodes see.
Ray's workers cannot listen for signals, so SIGTERM reaches them from here, through the store of Ray's head.
Ray is imported once it is known whether its cluster asks for a token.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from jobs.train import run_config, saying_what_is_saved, to_do, train_here
from pipeline import ray_join
from schemas.errors import EXIT_DONE, LatentpressError, RunError
from schemas.train_config import TrainConfig
from trainer import stopping

if TYPE_CHECKING:
    from ray.train import TrainingFailedError

_OWN_PRINT = "RAY_TRAIN_ENABLE_PRINT_PATCH"
"""Ray Train's own print() for its workers writes to a logger and to standard output, and both are shown. It
hands this setting on to them."""
_STORE = "latentpress"
"""Namespace in the store of Ray's head."""
_ASK_S = 1.0


def submit_ray(
    config_path: str | Path, *, overrides: Sequence[str], stage: str | None, address: str, workers: int
) -> int:
    """Train the run of a config on `workers` processes of the cluster at `address`; returns the exit code."""
    config = run_config(config_path, overrides=overrides, stage=stage)
    if to_do(config, ranks=workers):
        ray_join.join(address, named="--ray", log_to_driver=True)
        with saying_what_is_saved(config):
            fit(config, workers=workers)
    return EXIT_DONE


def fit(config: TrainConfig, *, workers: int) -> None:
    """Train on the cluster this process is connected to: on its GPUs, or where it has none on CPUs."""
    import ray
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = ray.cluster_resources().get("GPU", 0) > 0
    here = os.getcwd()
    os.environ.setdefault(_OWN_PRINT, "0")

    def worker() -> None:
        os.chdir(here)  # Ray's own folder means nothing to the paths of a config
        threading.Thread(target=_hear, daemon=True).start()
        train_here(config)

    trainer = TorchTrainer(
        worker,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        run_config=RunConfig(storage_path=str(Path(config.output).resolve()), name="ray"),
    )
    try:
        with _passed_on(signal.SIGTERM), ray_join.own_handler(signal.SIGINT):
            trainer.fit()
    except TrainingFailedError as error:
        raise _cause(error) from error
    except SystemExit as error:  # how Ray ends on Ctrl-C, once its workers are gone: as if all was done
        raise KeyboardInterrupt from error


@contextmanager
def _passed_on(number: signal.Signals) -> Iterator[None]:
    """This signal is for the ranks, which finish their step, save and end."""
    from ray.experimental import internal_kv

    key = _key()
    internal_kv._internal_kv_del(key, namespace=_STORE)

    def ask(number: int, frame: FrameType | None) -> None:
        put = {"key": key, "value": str(number), "namespace": _STORE}
        threading.Thread(target=internal_kv._internal_kv_put, kwargs=put).start()
        os.write(2, b"the ranks finish their step and save\n")  # print() may be what was interrupted

    before = signal.signal(number, ask)
    try:
        yield
    finally:
        signal.signal(number, before)


def _hear() -> None:
    """In a worker: stop training once the driver was told to; ends with its process."""
    from ray.experimental import internal_kv

    heard = False
    while not heard:
        time.sleep(_ASK_S)
        asked = internal_kv._internal_kv_get(_key(), namespace=_STORE)
        heard = asked is not None and stopping.ask(signal.Signals(int(asked)))


def _key() -> str:
    import ray

    return f"{ray.get_runtime_context().get_job_id()}/stop"


def _cause(error: TrainingFailedError) -> LatentpressError:
    """What the first failing rank had to say; the others follow from it."""
    from ray.train import WorkerGroupError

    if isinstance(error, WorkerGroupError):
        known = [
            failure for failure in error.worker_failures.values() if isinstance(failure, LatentpressError)
        ]
        if known:
            return known[0]
    return RunError(f"{error}\nthe checkpoints are whole, run again to resume")
