"""Where units run: in this process, or in Ray actors that own whole units. The only file that imports Ray.

Both give the same shards, as a unit knows nothing of who runs it. Only unit descriptions and small
results cross process borders; frames never do. The driver holds no state: a unit without a commit
record is simply run again by the next run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.generation import Unit
from pipeline.unit import UnitResult, UnitWorker
from schemas.card import Card
from schemas.config import PreprocessConfig
from schemas.errors import ConfigError, LatentpressError, MissingExtraError, RunError

if TYPE_CHECKING:
    import ray.actor

UNITS_IN_FLIGHT = 2
"""Per actor: one running, one queued, so that it never waits for the driver."""
MAX_DEATHS = 3
"""A unit that takes its actor down this often stops the run."""
_OBJECT_STORE_BYTES = 128 * 2**20
_CONNECT_S = 5.0
_PROBE_S = 10.0
_PLACED_S = 30.0
_TOKEN = Path.home() / ".ray" / "auth_token"
"""What `ray start` makes where its cluster asks for a token."""


class Executor(Protocol):
    """Runs units in any order; a context manager."""

    name: str
    workers: int

    def run(self, units: Sequence[Unit]) -> Iterator[UnitResult]: ...


@contextlib.contextmanager
def open_executor(config: PreprocessConfig, card: Card) -> Iterator[Executor]:
    """The executor that the config asks for, closed at the end."""
    settings = config.executor
    use_ray = settings.kind == "ray" or (
        settings.kind == "auto" and (settings.workers > 1 or settings.address != "")
    )
    executor = RayExecutor(config, card) if use_ray else LocalExecutor(config, card)
    try:
        yield executor
    finally:
        executor.close()


class LocalExecutor:
    """Units one after another in this process; decoding runs ahead in its children."""

    name = "local"

    def __init__(self, config: PreprocessConfig, card: Card) -> None:
        self.workers = config.executor.workers
        self._worker = UnitWorker(config, card, decoders=self.workers)

    def run(self, units: Sequence[Unit]) -> Iterator[UnitResult]:
        for unit in units:
            try:
                yield self._worker.run(unit)
            except OSError as error:
                raise _stopped(unit, error) from error

    def close(self) -> None:
        self._worker.close()


class RayExecutor:
    """Ray actors, one worker each, restarted by Ray for ever; deaths are counted per unit."""

    name = "ray"

    def __init__(self, config: PreprocessConfig, card: Card) -> None:
        _require_answer(config.executor.address)
        if config.executor.address and _TOKEN.exists() and "RAY_AUTH_MODE" not in os.environ:
            # Ray reads the mode when it is imported, so the cluster is asked first.
            asks = _asks_for_token(config.executor.address)
            os.environ["RAY_AUTH_MODE"] = "token" if asks else "disabled"
        try:
            import ray
        except ImportError:
            raise MissingExtraError("ray", "pipeline") from None
        self._ray, self._config = ray, config
        settings = config.executor
        self.workers = settings.workers
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
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
        actor: Any = ray.remote(
            num_cpus=1, num_gpus=settings.gpus_per_worker, max_restarts=-1, max_task_retries=0
        )(UnitWorker)
        self._actors: list[Any] = [actor.remote(config, card) for _ in range(settings.workers)]

    def _join(self, address: str) -> None:
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunError(
                f"the Ray cluster at executor.address = {address!r} cannot be joined: {error}. Its Ray must "
                "be of this version; where it asks for a token, copy its ~/.ray/auth_token to this machine"
            ) from error

    def _await_actors(self) -> None:
        """Return when every actor runs, saying so while that takes long; ConfigError where it never can."""
        settings = self._config.executor
        have: dict[str, float] = self._ray.cluster_resources()  # type: ignore[no-untyped-call]
        cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
        wants = f"{self.workers} workers of 1 CPU and {settings.gpus_per_worker:g} GPU each"
        fit = cpus >= self.workers and gpus >= self.workers * settings.gpus_per_worker
        if not fit and not settings.address:
            raise ConfigError(
                f"executor: {wants} do not fit this machine ({cpus:g} CPU, {gpus:g} GPU); "
                "lower executor.workers or executor.gpus_per_worker"
            )
        waiting = [actor.__ray_ready__.remote() for actor in self._actors]
        while waiting:
            _, waiting = self._ray.wait(waiting, num_returns=len(waiting), timeout=_PLACED_S)
            if waiting:
                print(
                    f"waiting for Ray to place {wants}; its cluster has {cpus:g} CPU, {gpus:g} GPU",
                    file=sys.stderr,
                    flush=True,
                )

    def run(self, units: Sequence[Unit]) -> Iterator[UnitResult]:
        if units:
            self._await_actors()
        todo = list(reversed(units))
        flying: dict[Any, tuple[ray.actor.ActorHandle[Any], Unit]] = {}
        deaths: dict[int, int] = {}

        def launch(actor: ray.actor.ActorHandle[Any]) -> None:
            if todo:
                unit = todo.pop()
                flying[actor.run.remote(unit)] = (actor, unit)

        for actor in self._actors * UNITS_IN_FLIGHT:
            launch(actor)
        while flying:
            (done, *_), _ = self._ray.wait(list(flying), num_returns=1)
            actor, unit = flying.pop(done)
            try:
                result = self._ray.get(done)
            except self._ray.exceptions.RayActorError as error:
                # Both units in flight fail with their actor; which one did it shows by repetition.
                deaths[unit.number] = deaths.get(unit.number, 0) + 1
                if deaths[unit.number] >= MAX_DEATHS:
                    raise RunError(
                        f"the worker died {MAX_DEATHS} times while it held {unit.family} unit {unit.number} "
                        f"(rows {[row.get('source', row['key']) for row in unit.rows]}): {error}. "
                        "Out of memory is the usual cause: lower executor.workers or limits.memory_bytes"
                    ) from error
                todo.append(unit)
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause
                if isinstance(cause, LatentpressError):
                    raise cause from error
                if isinstance(cause, OSError):
                    raise _stopped(unit, cause) from error
                raise
            except self._ray.exceptions.RayError as error:
                raise RunError(
                    f"Ray failed: {error}. What is committed stays; run the same command again"
                ) from error
            else:
                yield result
            launch(actor)

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()


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


def _stopped(unit: Unit, error: OSError) -> RunError:
    return RunError(
        f"{unit.family} unit {unit.number} could not be written: {error}. "
        "What is committed stays; run the same command again once this is mended"
    )
