"""Where units run: in this process, or in Ray actors.

Both give the same shards, as a unit knows nothing of who runs it, and both are led by one foreman, which
holds the failure policy. Running units here costs no second start of the libraries, and means that an
encoder that crashes takes the driver with it (decoders have processes of their own): such a run ends without
a word and stops at the same unit again. `executor.kind = "ray"` survives it and finds the row.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pipeline.child_decoder import DECODE_AHEAD
from pipeline.commit import Committing
from pipeline.crew import Crew, Event, Failed, Finished, Ready, Task
from pipeline.decoders import DecoderShare
from pipeline.foreman import Foreman
from pipeline.generation import Unit
from pipeline.memory import available_bytes
from pipeline.progress import say
from pipeline.unit import UnitResult, UnitWorker, result_of
from schemas.card import Card
from schemas.config import ExecutorConfig, PreprocessConfig
from schemas.dataset import Dataset
from schemas.sample import Family
from schemas.store import is_url

Result = TypeVar("Result")
MEMORY_SHARE = 0.5
"""Of the available memory for decoders of this process; the rest is the encoder's and its batches'."""
CHILD_BYTES = 512 * 2**20
"""Of a decoder beside the clips in its slots: libraries, pictures of a decoder at work, packets."""


@contextlib.contextmanager
def open_executor(
    config: PreprocessConfig,
    card: Card,
    *,
    committing: Committing,
    note: Callable[[str, str, Family | None], None],
) -> Iterator[Foreman]:
    """A foreman with the crew that the config asks for, closed at the end; `note` as for `Foreman`."""
    dataset = Dataset(config.output)
    crew: Crew
    if uses_ray(config.executor):
        from pipeline.ray_crew import RayCrew

        crew = RayCrew(config, card, committing=committing)
    else:
        crew = LocalCrew(config, card, committing=committing)

    def found(unit: Unit) -> UnitResult | None:
        commit = dataset.commit(unit.family, unit.number)
        return None if commit is None else result_of(unit, commit)

    try:
        # Shards on their way to an object store are written here.
        where = tempfile.gettempdir() if is_url(config.output) else config.output
        yield Foreman(crew, found=found, note=note, where=where)
    finally:
        crew.close()


def uses_ray(settings: ExecutorConfig) -> bool:
    """Whether units run in Ray actors."""
    asked = settings.workers > 1 or settings.address != "" or settings.decode_actors > 0
    return settings.kind == "ray" or (settings.kind == "auto" and asked)


def in_worker(config: PreprocessConfig, function: Callable[..., Result], *args: Any) -> Result:
    """The result of a function run where, and with what, a worker will run: in this process for `local`, else
    in a process of Ray's that ends with it. What it raises is raised here.

    The function and its arguments must pickle, and so must its result. Ray stays up for the executor that
    follows, or until this process ends.
    """
    if not uses_ray(config.executor):
        return function(*args)
    from pipeline.ray_cluster import RayCluster

    return RayCluster(config).run(function, *args)


def local_share(config: PreprocessConfig, *, cores: int, memory: int) -> DecoderShare:
    """What this process may have of decoders: `executor.workers` to begin with and up to one a core, as far
    as they fit MEMORY_SHARE of the bytes of `memory` with the clips they hold; at least one."""
    settings = config.executor
    if settings.decoders_per_worker:
        return DecoderShare(settings.decoders_per_worker, settings.decoders_per_worker)
    clip = max(bucket.num_frames * bucket.height * bucket.width * 3 for bucket in config.buckets)
    fit = max(1, int(MEMORY_SHARE * memory) // (DECODE_AHEAD * clip + CHILD_BYTES))
    return DecoderShare(min(fit, settings.workers), min(fit, max(settings.workers, cores)))


class LocalCrew:
    """One unit after another in this process; decoding runs ahead in its children."""

    name = "local"
    workers = 1
    depth = 1

    def __init__(self, config: PreprocessConfig, card: Card, *, committing: Committing) -> None:
        share = local_share(config, cores=len(os.sched_getaffinity(0)), memory=available_bytes())
        self._worker = UnitWorker(config, card, committing, share, say)
        self._given: Task | None = None
        self._said_ready = False

    @property
    def gpu_names(self) -> list[str]:
        """Of the GPU that an encoder used, which has loaded torch then."""
        if "torch" not in sys.modules:
            return []
        import torch

        return [torch.cuda.get_device_name()] if torch.cuda.is_initialized() else []

    def give(self, worker: int, task: Task) -> None:
        self._given = task

    def next(self, timeout_s: float | None) -> Event | None:
        if not self._said_ready:
            self._said_ready = True
            return Ready(0)
        if self._given is None:
            time.sleep(timeout_s or 0.0)
            return None
        task, self._given = self._given, None
        try:
            return Finished(0, task, self._worker.run(task.unit, condemned=task.condemned, then=task.then))
        except Exception as error:
            return Failed(0, task, error)

    def close(self) -> None:
        self._worker.close()
