"""The TensorBoard log of a run: numbers by step in; a folder for its viewer out.

A copy of metrics.jsonl for those who watch, so nothing that goes wrong with it stops a run: a line says that
the log ends, and training goes on without one.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Board:
    """Writes to a folder while the package `tensorboard` and the disk allow it."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """The viewer forgets what lies beyond `first_step`."""
        self._writer: Any = None
        self._hook = threading.excepthook
        threading.excepthook = self._quietly
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of what tensorboard itself imports
                from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        except ImportError:
            print("no TensorBoard log: pip install tensorboard; metrics.jsonl has it all")
        except Exception as error:
            self._end(error)

    def add(self, name: str, values: Mapping[str, Any], *, step: int) -> None:
        """The numbers of a nested record, each by its path below `name`."""
        if self._writer is None:
            return
        try:
            for path, value in _numbers(values, name):
                self._writer.add_scalar(path, value, step)
        except Exception as error:
            self._end(error)

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except Exception as error:
            self._end(error)
        finally:
            threading.excepthook = self._hook

    def _end(self, error: Exception) -> None:
        self._writer = None
        print(f"the TensorBoard log ends here: {error}; metrics.jsonl has it all", flush=True)

    def _quietly(self, failed: threading.ExceptHookArgs) -> None:
        """No traceback for what the next call of TensorBoard's writer raises again."""
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self._hook(failed)


def _numbers(values: Mapping[str, Any], name: str) -> Iterator[tuple[str, float]]:
    """The numbers of a nested record, by path: step/loss, step/loss_by_duration/0-3s."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{name}/{key}")
        elif isinstance(value, int | float) and key != "step":
            yield f"{name}/{key}", float(value)
