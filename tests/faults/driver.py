"""One run of `preprocess` in a process of its own that may be killed, stopped or given a bad disk.

A fork server imports everything once, and every driver is a fork of it: a run of the tiny job takes half a
second instead of five. The driver says in a file beside the dataset how it ended, if it lives to.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

from schemas.config import PreprocessConfig
from tests.faults.taps import Op, Plan, Tap

_MARK = "PYTHON_LATENTPRESS_FAULTS"
"""In the environment of all that a driver starts; decoders inherit few names, those of Python among them."""
_RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
_END_S = 120.0
_REPOSITORY = Path(__file__).absolute().parents[2]


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    """With its server running: a new interpreter, which finds the repository and starts no threads by its
    environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.warm"])
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")])),
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "HF_HUB_OFFLINE"), "1"),
    }
    with patch.dict(os.environ, environment):
        forkserver.ensure_running()
    return context


class Driver:
    """A running `preprocess`; `folder` holds the dataset as `latents`, and is what the taps watch."""

    def __init__(self, config: PreprocessConfig, plan: Plan | None = None, *, record: bool = False) -> None:
        self.folder = Path(config.output).parent
        self.mark = uuid.uuid4().hex
        self._notes = self.folder.parent / f"{self.folder.name}-{self.mark}"
        arguments = (config, self.folder, plan or Plan(), self._notes, record, self.mark)
        self._process = _context().Process(target=_drive, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    @property
    def stopped(self) -> bool:
        """By SIGSTOP."""
        state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "T"

    def wait(self, timeout_s: float = _END_S) -> dict[str, Any]:
        """How it ended: `summary` and `ran`; `error` (a sentence for a person); `signal`; or, which is always
        wrong, `traceback` or `hangs`."""
        self._process.join(timeout_s)
        code = self._process.exitcode
        if code is None:
            self.kill_tree()
            self._process.join()
        self._process.close()
        if code is None:
            return {"hangs": f"still runs after {timeout_s} s: {self.log()[-500:]}"}
        if code < 0:
            return {"signal": signal.Signals(-code).name}
        end: dict[str, Any] = json.loads(self._notes.with_suffix(".json").read_text())
        return end

    def log(self) -> str:
        """What it printed."""
        return self._notes.with_suffix(".log").read_text(errors="replace")

    def ops(self) -> list[Op]:
        """The calls it made, of a driver started with `record` that came to its end."""
        ops: list[Op] = pickle.loads(self._notes.with_suffix(".ops").read_bytes())
        return ops

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def offspring(self) -> dict[int, str]:
        """Id -> command line of the living processes that the driver started, directly or not."""
        return dict(_marked(f"{_MARK}={self.mark}"))

    def kill_tree(self) -> None:
        """SIGKILL to the driver and everything it started."""
        for pid in (self.pid, *self.offspring()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def survivors(self, *, within_s: float) -> dict[int, str]:
        """What of a dead driver's offspring is left after `within_s`, without Ray's own agents."""
        deadline = time.monotonic() + within_s
        while (left := self._workers()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def _workers(self) -> dict[int, str]:
        """Offspring that touches a dataset. Ray's agents notice a minute later that their node is gone."""
        return {pid: what for pid, what in self.offspring().items() if not what.startswith(_RAY_AGENTS)}


def _marked(mark: str) -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it ended meanwhile; a zombie has no environment
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    yield int(entry.name), command.decode().rstrip()


def _drive(config: PreprocessConfig, folder: Path, plan: Plan, notes: Path, record: bool, mark: str) -> None:
    """The driver's whole life."""
    log = os.open(notes.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ[_MARK] = mark
    from pipeline.graph import preprocess
    from schemas.errors import LatentpressError
    from tests.faults import sabotage

    tap = Tap(folder, plan)
    tap.install()
    if plan.sabotage:
        getattr(sabotage, plan.sabotage)(folder)
    end: dict[str, Any]
    try:
        summary, ran = preprocess(config)
        end = {"summary": summary, "ran": ran}
    except LatentpressError as error:
        end = {"error": f"{type(error).__name__}: {error}"}
    except BaseException as error:
        *_, where = [
            frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename
        ]
        end = {"traceback": f"{error!r} in {where.name}, {Path(where.filename).name}:{where.lineno}"}
    sys.stderr.flush()
    if record:
        notes.with_suffix(".ops").write_bytes(pickle.dumps(tap.ops))
    notes.with_suffix(".json").write_text(json.dumps(end))
