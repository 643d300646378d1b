"""Workers in Ray actors that own whole units.

Only unit descriptions and small results pass between driver and workers. An actor that dies is replaced by a
new one, not restarted, so what it held is known exactly.
"""

from __future__ import annotations

import time
from typing import Any

from pipeline.commit import Committing
from pipeline.crew import Died, Event, Failed, Finished, Ready, Task
from pipeline.foreman import RESUMES
from pipeline.progress import say
from pipeline.ray_cluster import POLL_S, RayCluster
from pipeline.ray_join import first_sentence, tell, told
from pipeline.unit import UnitWorker
from schemas.card import Card
from schemas.config import PreprocessConfig
from schemas.errors import RunError

_PLACED_S = 30.0


class RayCrew:
    """One actor a worker, each with one unit running and one queued, so that it never waits for the driver.

    Ray ends the actors of a driver that is gone; decoders, children or actors, end with their worker.
    """

    name = "ray"
    depth = 2

    def __init__(self, config: PreprocessConfig, card: Card, *, committing: Committing) -> None:
        self._cluster = RayCluster(config)
        self._ray = self._cluster.ray
        self.gpu_names: list[str] = self._cluster.gpu_names
        self._arguments = (config, card, committing)
        self.workers = config.executor.workers
        self._actor: Any = self._cluster.actor(UnitWorker)
        self._actors: dict[int, Any] = {}
        self._starting: dict[Any, int] = {}
        """Future -> worker that it is the readiness of."""
        self._flying: dict[Any, tuple[int, Task]] = {}
        """Future -> what it is the result of, in the order given."""
        self._said = self._heard = time.monotonic()
        for worker in range(self.workers):
            self._start(worker)

    def give(self, worker: int, task: Task) -> None:
        actor = self._actors[worker]
        if task.row is None:
            future = actor.run.remote(task.unit, condemned=task.condemned, then=task.then)
        else:
            future = actor.try_row.remote(task.unit, task.row)
        self._flying[future] = (worker, task)

    def next(self, timeout_s: float | None) -> Event | None:
        """The next event; RunError where Ray itself is gone."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = POLL_S if deadline is None else min(POLL_S, max(0.0, deadline - time.monotonic()))
            waiting = [*self._flying, *self._starting]
            self._cluster.require_life()
            if time.monotonic() - self._heard > POLL_S:
                self._hear()
            if not waiting:  # everything waits for its next try
                time.sleep(left)
            try:
                done, _ = self._ray.wait(waiting, num_returns=1, timeout=left) if waiting else ([], [])
                if done:
                    return self._event(done[0])
            except self._ray.exceptions.RayError as error:
                self._cluster.require_life(at_once=True)
                raise RunError(f"Ray failed: {error}. {RESUMES}") from error
            if deadline is not None and time.monotonic() >= deadline:
                return None
            self._say_where_it_waits()

    def close(self) -> None:
        if not self._cluster.silent():  # Ray would wait a minute for a dead head and then abort the driver
            self._hear()
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._cluster.close()

    def _event(self, future: Any) -> Event:
        errors = self._ray.exceptions
        starting = self._starting.get(future)
        try:
            result = self._ray.get(future)
        except errors.RayTaskError as error:
            if starting is not None or not isinstance(error.cause, Exception):
                raise
            return Failed(*self._flying.pop(future), error.cause)
        except (errors.RayActorError, errors.OutOfMemoryError) as error:
            return self._replace(self._flying[future][0] if starting is None else starting, error)
        if starting is not None:
            del self._starting[future]
            return Ready(starting)
        return Finished(*self._flying.pop(future), result)

    def _start(self, worker: int) -> None:
        self._actors[worker] = self._actor.remote(*self._arguments, self._cluster.shares[worker], tell)
        self._starting[self._actors[worker].__ray_ready__.remote()] = worker

    def _replace(self, worker: int, error: Exception) -> Died:
        """Start a new actor in place of a dead one; everything that one held is lost, begun or not."""
        self._cluster.require_life(at_once=True)
        if getattr(error, "actor_init_failed", False):
            raise RunError(f"worker {worker} cannot start: {error}. {RESUMES}") from error
        held = tuple(task for number, task in self._flying.values() if number == worker)
        self._flying = {key: value for key, value in self._flying.items() if value[0] != worker}
        self._starting = {key: number for key, number in self._starting.items() if number != worker}
        self._ray.kill(self._actors[worker])
        self._start(worker)
        starved = isinstance(error, self._ray.exceptions.OutOfMemoryError)
        why = "Ray ended it for want of memory" if starved else first_sentence(error)
        return Died(worker, held, why, starved=starved)

    def _hear(self) -> None:
        """Say what workers told."""
        self._heard = time.monotonic()
        for sentence in told():
            say(sentence)

    def _say_where_it_waits(self) -> None:
        if self._starting and time.monotonic() - self._said > _PLACED_S:
            self._said = time.monotonic()
            say(
                f"{len(self._starting)} of {self.workers} workers wait for Ray to place "
                f"{self._cluster.wants}; its cluster has {self._cluster.has}. Add nodes, or lower "
                "executor.workers, decode_actors, decoders_per_worker or gpus_per_worker"
            )
