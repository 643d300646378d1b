"""Workers in Ray actors that own whole units. The only file that imports Ray.

Only unit descriptions and small results cross process borders; frames never do. An actor that dies is
replaced by a new one, not restarted, so what it held is known exactly. Ray's own processes are looked
after: Ray would wait a minute for a dead head and then abort the driver, or wait for ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.commit import Committing
from pipeline.crew import Died, Event, Failed, Finished, Ready, Task
from pipeline.foreman import RESUMES
from pipeline.progress import say
from pipeline.unit import UnitWorker
from schemas.card import Card
from schemas.config import PreprocessConfig
from schemas.errors import ConfigError, MissingExtraError, RunError

_OBJECT_STORE_BYTES = 128 * 2**20
_CONNECT_S = 5.0
_PROBE_S = 10.0
_PLACED_S = 30.0
_POLL_S = 1.0
_SILENT_TRIES = 5
"""A second apart: how long Ray's head, or its process on this machine, may be away."""
_TOKEN = Path.home() / ".ray" / "auth_token"
"""What `ray start` makes where its cluster asks for a token."""


class RayCrew:
    """One actor a worker, each with one unit running and one queued, so that it never waits for the driver.

    Ray ends the actors of a driver that is gone, and decoder children end with their actor.
    """

    name = "ray"
    depth = 2

    def __init__(self, config: PreprocessConfig, card: Card, *, committing: Committing) -> None:
        settings = config.executor
        _require_answer(settings.address)
        if settings.address and _TOKEN.exists() and "RAY_AUTH_MODE" not in os.environ:
            # Ray reads the mode when it is imported, so the cluster is asked first.
            os.environ["RAY_AUTH_MODE"] = "token" if _asks_for_token(settings.address) else "disabled"
        try:
            import ray
        except ImportError:
            raise MissingExtraError("ray", "pipeline") from None
        self._ray, self._config = ray, config
        self._arguments = (config, card, committing)
        self.workers = settings.workers
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        with _own_sigterm():
            if settings.address:
                self._join(settings.address)
            else:
                ray.init(
                    address="local",
                    num_cpus=max(settings.workers, os.cpu_count() or 1),
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        self._lifelines = self._addresses()
        self._require_room()
        self._actor: Any = ray.remote(num_cpus=1, num_gpus=settings.gpus_per_worker)(UnitWorker)
        self._actors: dict[int, Any] = {}
        self._starting: dict[Any, int] = {}
        """Future -> worker that it is the readiness of."""
        self._flying: dict[Any, tuple[int, Task]] = {}
        """Future -> what it is the result of, in the order given."""
        self._said = self._checked = time.monotonic()
        for worker in range(self.workers):
            self._start(worker)

    def give(self, worker: int, task: Task) -> None:
        actor = self._actors[worker]
        if task.row is None:
            future = actor.run.remote(task.unit, condemned=task.condemned)
        else:
            future = actor.try_row.remote(task.unit, task.row)
        self._flying[future] = (worker, task)

    def next(self, timeout_s: float | None) -> Event | None:
        """The next event; RunError where Ray itself is gone."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = _POLL_S if deadline is None else min(_POLL_S, max(0.0, deadline - time.monotonic()))
            waiting = [*self._flying, *self._starting]
            if time.monotonic() - self._checked > _POLL_S:
                self._require_life()
            if not waiting:  # everything waits for its next try
                time.sleep(left)
            try:
                done, _ = self._ray.wait(waiting, num_returns=1, timeout=left) if waiting else ([], [])
                if done:
                    return self._event(done[0])
            except self._ray.exceptions.RayError as error:
                self._require_life()
                raise RunError(f"Ray failed: {error}. {RESUMES}") from error
            if deadline is not None and time.monotonic() >= deadline:
                return None
            self._say_where_it_waits()

    def close(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._ray.shutdown()

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
        self._actors[worker] = self._actor.remote(*self._arguments)
        self._starting[self._actors[worker].__ray_ready__.remote()] = worker

    def _replace(self, worker: int, error: Exception) -> Died:
        """Start a new actor in place of a dead one; everything that one held is lost, begun or not."""
        self._require_life()
        if getattr(error, "actor_init_failed", False):
            raise RunError(f"worker {worker} cannot start: {error}. {RESUMES}") from error
        held = tuple(task for number, task in self._flying.values() if number == worker)
        self._flying = {key: value for key, value in self._flying.items() if value[0] != worker}
        self._starting = {key: number for key, number in self._starting.items() if number != worker}
        self._ray.kill(self._actors[worker])
        self._start(worker)
        starved = isinstance(error, self._ray.exceptions.OutOfMemoryError)
        why = "Ray ended it for want of memory" if starved else _first_sentence(error)
        return Died(worker, held, why, starved=starved)

    def _join(self, address: str) -> None:
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunError(
                f"the Ray cluster at executor.address = {address!r} cannot be joined: {error}. Its Ray must "
                "be of this version; where it asks for a token, copy its ~/.ray/auth_token to this machine"
            ) from error

    def _require_room(self) -> None:
        """ConfigError where the workers can never all be placed on this machine."""
        settings = self._config.executor
        have: dict[str, float] = self._ray.cluster_resources()  # type: ignore[no-untyped-call]
        cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
        self._wants = f"{self.workers} workers of 1 CPU and {settings.gpus_per_worker:g} GPU each"
        self._has = f"{cpus:g} CPU, {gpus:g} GPU"
        fit = cpus >= self.workers and gpus >= self.workers * settings.gpus_per_worker
        if not fit and not settings.address:
            self._ray.shutdown()
            raise ConfigError(
                f"executor: {self._wants} do not fit this machine ({self._has}); "
                "lower executor.workers or executor.gpus_per_worker"
            )

    def _say_where_it_waits(self) -> None:
        if self._starting and time.monotonic() - self._said > _PLACED_S:
            self._said = time.monotonic()
            say(
                f"{len(self._starting)} of {self.workers} workers wait for Ray to place {self._wants}; "
                f"its cluster has {self._has}"
            )

    def _addresses(self) -> dict[str, tuple[str, int]]:
        """Where the two processes of Ray listen that this one cannot do without."""
        context = self._ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        nodes: list[dict[str, Any]] = self._ray.nodes()  # type: ignore[no-untyped-call]
        here = next(node for node in nodes if node["NodeID"] == context.get_node_id())
        return {
            "head": (host.strip("[]"), int(port)),
            "raylet": (here["NodeManagerAddress"], here["NodeManagerPort"]),
        }

    def _require_life(self) -> None:
        """Return at once where Ray's own processes answer; RunError where one stays silent."""
        for _ in range(_SILENT_TRIES):
            silent = [name for name, address in self._lifelines.items() if not _answers(address)]
            if not silent:
                self._checked = time.monotonic()
                return
            time.sleep(_POLL_S)
        host, port = self._lifelines[silent[0]]
        raise RunError(
            f"Ray's {' and '.join(silent)} ({host}:{port}) no longer answers: it was killed, or ran out of "
            f"memory. {RESUMES}"
        )


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what SIGTERM does here: `ray.init` sets a handler of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def _first_sentence(error: Exception) -> str:
    """Ray's text without its lists of possible causes."""
    text = " ".join(str(error).split())
    detail = text.partition("Worker exit detail: ")[2] or text
    return detail.partition(" Some common causes")[0].partition(" There are some potential")[0]


def _require_answer(address: str) -> None:
    """ConfigError where nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():  # such as "auto"
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"executor.address = {address!r}: nothing answers there ({error}); "
            "start a cluster with `ray start --head --port=PORT`"
        ) from error


def _asks_for_token(address: str) -> bool:
    """Whether the Ray cluster at `address` refuses who brings no token; tried in a process of its own."""
    join = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False)"
    with contextlib.suppress(subprocess.TimeoutExpired):
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-c", join, address]
        run = subprocess.run(command, env=environment, capture_output=True, timeout=_PROBE_S, check=False)
        return run.returncode != 0
    return True
