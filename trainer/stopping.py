"""When to stop before the end: signals and clocks in; a yes, and its reason, out.

A run that is told to stop finishes its step, saves and ends with exit code 0, to be started again. Every
rank asks for itself, and the loop adds the answers up, so that all stop after the same step whichever
clock or signal came first.
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
_RECENT = 20
"""Steps whose longest stands for the next one."""


class Stopping:
    """What this rank knows of the end of its time."""

    def __init__(self, settings: CheckpointConfig) -> None:
        """The clock of `time_limit_s` starts now."""
        self._steps_s: deque[float] = deque(maxlen=_RECENT)
        self.received: list[signal.Signals] = []
        now = time.time()
        slurm = os.environ.get(SLURM_END, "")
        limits = {
            "checkpoint.time_limit_s": now + settings.time_limit_s if settings.time_limit_s else float("inf"),
            "the end of the Slurm job": float(slurm) if slurm.isdecimal() else float("inf"),
        }
        self._limit = min(limits, key=lambda name: limits[name])
        self._end = limits[self._limit] - settings.time_margin_s

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


@contextmanager
def stopping(settings: CheckpointConfig) -> Iterator[Stopping]:
    """Listens for stop signals while training, where signals can be listened for: in the main thread."""
    state = Stopping(settings)

    def note(number: int, frame: FrameType | None) -> None:
        state.received.append(signal.Signals(number))

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # a worker of Ray Train runs in another one
        before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
