"""A child interpreter that speaks lines of JSON: started, listened to with a deadline, killed, explained.

In: what the interpreter runs and its first line of setup. Out: its answers, or the news that it is gone.
A fresh interpreter, not a fork: it holds none of the parent's memory, threads or locks.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 60.0
"""For a new child to import its libraries and say it is ready."""
EXIT_TIMEOUT_S = 5.0
"""Between a child's last word and its exit."""
STDERR_BYTES = 2000
"""Of what a child printed before it died, for the message."""
_PACKAGES = str(Path(__file__).resolve().parents[1])


class ChildProcess:
    """A Python process that answers lines of JSON, from its start to its end."""

    def __init__(self, program: Sequence[str], setup: dict[str, Any], *, keep_open: Sequence[int]) -> None:
        path = os.pathsep.join(filter(None, [_PACKAGES, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=keep_open,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._lines, self._stderr = b"", b""
        self.ready = False
        """Whether it has finished starting."""
        self._start_deadline = time.monotonic() + START_TIMEOUT_S
        self.send(setup)

    def send(self, message: dict[str, Any]) -> None:
        """Write one line; a child that is already dead is noticed by `receive`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, deadline: float) -> dict[str, Any] | None:
        """The next line, None once the child is gone; TimeoutError past `deadline` (monotonic seconds).

        The child's first line says that it is ready; until then it has START_TIMEOUT_S.
        """
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        out, err = self._process.stdout.fileno(), self._process.stderr.fileno()
        while b"\n" not in self._lines:
            limit = deadline if self.ready else self._start_deadline
            heard, _, _ = select.select([out, err], [], [], max(0.0, limit - time.monotonic()))
            if not heard:
                raise TimeoutError
            if err in heard:
                self._stderr = (self._stderr + os.read(err, 65536))[-STDERR_BYTES:]
            if out in heard:
                data = os.read(out, 65536)
                if not data:
                    return None
                self._lines += data
        line, _, self._lines = self._lines.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        self.ready = True
        return message

    @property
    def was_killed(self) -> bool:
        """Whether the child, which is gone, died of a signal."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(EXIT_TIMEOUT_S) < 0
        return False

    def epitaph(self) -> str:
        """How the child died, and the last it printed."""
        try:
            code = self._process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "it closed its pipe and hangs"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        said = self._stderr.decode(errors="replace").strip()
        return f"{how}; it said: {said}" if said else how

    def kill(self) -> None:
        """End the child; one that waits for a file system that does not answer ends when that does."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_TIMEOUT_S)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
