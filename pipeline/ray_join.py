"""Ray started on this machine, or this process joined to a cluster; it leads to `pipeline.ray_cluster`. And
sentences from the processes of a run to its driver, as showing what they print would show every library's.

Ray would try for minutes where nothing answers, take SIGTERM for itself, and refuse a cluster that asks for
no token where a token lies about: all of that is seen to before.
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
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from schemas.config import PreprocessConfig
from schemas.errors import ConfigError, MissingExtraError, RunError

_OBJECT_STORE_BYTES = 128 * 2**20
_CONNECT_S = 5.0
_PROBE_S = 10.0
_MAIL = "latentpress"
"""Namespace in the store of Ray's head, where sentences lie until they are fetched."""
_TOKEN = Path.home() / ".ray" / "auth_token"
"""What `ray start` makes where its cluster asks for a token."""


def connect(config: PreprocessConfig, *, cpus: int) -> Any:
    """Ray, with this process joined to a cluster."""
    settings = config.executor
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return sys.modules["ray"]
    if settings.address:
        ray = join(settings.address, named="executor.address", log_to_driver=False)
    else:
        ray = _imported()
        with own_handler(signal.SIGTERM):
            ray.init(
                address="local",
                num_cpus=max(cpus, os.cpu_count() or 1),
                # Frames pass through it only from decode actors; Ray then takes its usual share of memory.
                object_store_memory=None if settings.decode_actors else _OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    # Else what raylets report, such as each death of an actor, is shown whatever `log_to_driver` says.
    ray._private.worker._worker_logs_enabled = False
    return ray


def join(address: str, *, named: str, log_to_driver: bool) -> Any:
    """Ray, with this process joined to the cluster at an address; `named` is what the user calls the address.

    ConfigError where nothing answers, RunError where the cluster does not take this process.
    """
    _require_answer(address, named=named)
    if _TOKEN.exists() and "RAY_AUTH_MODE" not in os.environ:
        # Ray reads the mode when it is imported, so the cluster is asked first.
        os.environ["RAY_AUTH_MODE"] = "token" if _asks_for_token(address) else "disabled"
    ray = _imported()
    try:
        with own_handler(signal.SIGTERM):
            ray.init(address=address, log_to_driver=log_to_driver, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(
            f"the Ray cluster at {named} = {address!r} cannot be joined: {error}. Its Ray must "
            "be of this version; where it asks for a token, copy its ~/.ray/auth_token to this machine"
        ) from error
    return ray


def _imported() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "pipeline") from None
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    return ray


def tell(sentence: str) -> None:
    """Have the driver of this run say a sentence; nobody does where Ray's head is gone."""
    import ray
    from ray.experimental import internal_kv

    with contextlib.suppress(Exception):
        key = f"{ray.get_runtime_context().get_job_id()}/{time.time_ns():020}/{uuid.uuid4().hex}"
        internal_kv._internal_kv_put(key, sentence, namespace=_MAIL)


def told() -> list[str]:
    """What this run's processes told since the last call."""
    import ray
    from ray.experimental import internal_kv

    found: list[str] = []
    with contextlib.suppress(Exception):
        mine = f"{ray.get_runtime_context().get_job_id()}/"
        for key in sorted(internal_kv._internal_kv_list(mine, namespace=_MAIL)):
            found.append(internal_kv._internal_kv_get(key, namespace=_MAIL).decode())
            internal_kv._internal_kv_del(key, namespace=_MAIL)
    return found


def first_sentence(error: Exception) -> str:
    """Ray's text about a death, without its lists of possible causes."""
    text = " ".join(str(error).split())
    detail = text.partition("Worker exit detail: ")[2] or text
    return detail.partition(" Some common causes")[0].partition(" There are some potential")[0]


@contextlib.contextmanager
def own_handler(number: signal.Signals) -> Iterator[None]:
    """Keep what this signal does here: Ray sets handlers of its own, and leaves them set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, before)


def answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def _require_answer(address: str, *, named: str) -> None:
    """ConfigError where nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():  # such as "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"{named} = {address!r}: nothing answers there ({error}); "
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
