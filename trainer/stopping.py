"""When to stop before the end: signals and clocks in; a yes, and its reason, out.

A run that is told to stop finishes its step, saves and ends with exit code 0, to be started again. Every
rank asks for itself, and the loop adds the answers up, so that all stop after the same step whichever
clock or signal came first. Ctrl-C is such a signal while there is a step to lose, and then an interrupt.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from schemas.train_config import CheckpointConfig

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take the machine away."""
SLURM_END = "SLURM_JOB_END_TIME"
"""Slurm's own end of a job, in seconds since 1970 (https://slurm.schedmd.com/sbatch.html)."""
CTRL_C = "\nCtrl-C: the run finishes its step or look, saves and ends; press again to end without that\n"
_listening: list[Stopping] = []
_RECENT = 20
"""Steps whose longest stands for the next one."""


class Stopping:
    """What this rank knows of the end of its time."""

    def __init__(self, settings: CheckpointConfig) -> None:
        """The clock of `time_limit_s` starts now."""
        self._steps_s: deque[float] = deque(maxlen=_RECENT)
        self.received: list[signal.Signals] = []
        self._before: dict[signal.Signals, Any] = {}
        now = time.time()
        slurm = os.environ.get(SLURM_END, "")
        limits = {
            "checkpoint.time_limit_s": now + settings.time_limit_s if settings.time_limit_s else float("inf"),
            "the end of the Slurm job": float(slurm) if slurm.isdecimal() else float("inf"),
        }
        self._limit = min(limits, key=lambda name: limits[name])
        self._end = limits[self._limit] - settings.time_margin_s

    def begin(self, *, tell: bool) -> None:
        """A step begins: from now on the first Ctrl-C stops the run, and says so where `tell`; a second one
        does what it did before.

        Where none of Python's handlers was there (SIG_DFL) it is for the launcher to say and to end: of its
        ranks, which get every Ctrl-C from the terminal and from it. Where it is ignored it stays so.
        """
        before = signal.getsignal(signal.SIGINT)
        if not _in_main_thread() or signal.SIGINT in self._before or before in (signal.SIG_IGN, None):
            return

        def note(number: int, frame: FrameType | None) -> None:
            if not self.interrupted:
                self.received.append(signal.SIGINT)
                if tell and callable(before):
                    os.write(2, CTRL_C.encode())  # print() may itself be what was interrupted
            elif callable(before):
                before(number, frame)

        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, note)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed: then training ends with KeyboardInterrupt once all is saved."""
        return signal.SIGINT in self.received

    def took(self, seconds: float) -> None:
        """Note how long a step took."""
        self._steps_s.append(seconds)

    @property
    def told(self) -> bool:
        """Whether no further step should begin: one as long as the longest recent one would end too late."""
        return bool(self.received) or self._too_late()

    @property
    def reason(self) -> str:
        """Why, for a person; some other rank's reason where this one has none."""
        if self.received:
            return f"by {self.received[0].name}"
        return f"before {self._limit}" if self._too_late() else "by a signal to another rank"

    def _too_late(self) -> bool:
        return time.time() + max(self._steps_s, default=0.0) >= self._end


def ask(number: signal.Signals) -> bool:
    """Stop as if this signal had come; from any thread. Whether training heard it."""
    for state in _listening:
        state.received.append(number)
    return bool(_listening)


@contextmanager
def stopping(settings: CheckpointConfig) -> Iterator[Stopping]:
    """Listens for stop signals while training; in a thread that is not the main one, to `ask` alone."""
    state = Stopping(settings)

    def note(number: int, frame: FrameType | None) -> None:
        state.received.append(signal.Signals(number))

    if _in_main_thread():
        state._before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    _listening.append(state)
    try:
        yield state
    finally:
        _listening.remove(state)
        for number, handler in state._before.items():
            signal.signal(number, handler)


def _in_main_thread() -> bool:
    """Whether signals can be listened for: a worker of Ray Train runs in another thread."""
    return threading.current_thread() is threading.main_thread()
