"""A child interpreter that speaks lines of JSON: started, listened to with a deadline, killed, explained.

In: what the interpreter runs and its first line of setup. Out: the lines it says, or that it is gone.
A fresh interpreter, not a fork: it holds none of the parent's memory, threads or locks, and of its
environment only what an interpreter and its libraries need. A child that does not listen, talks without end
or closes its pipes holds its parent up no longer than the deadline.
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

from pipeline.child_answers import BadAnswer, plain

START_TIMEOUT_S = 60.0
"""For a new child to import its libraries and say it is ready."""
EXIT_TIMEOUT_S = 5.0
"""Between a child's last word and its exit."""
GRACE_S = 1.0
"""For the rest of a line that was in the pipe when the parent first looked, past the deadline."""
LINE_BYTES = 4 * 2**20
"""Of one answer; the longest sound ones hold two numbers a frame."""
STDERR_BYTES = 1500
"""Of what a child printed before it died, for the message."""
_ENVIRONMENT = {"PATH", "HOME", "LANG", "LANGUAGE", "TMPDIR", "TZ", "VIRTUAL_ENV", "CONDA_PREFIX"}
_ENVIRONMENT_OF = ("LC_", "LD_", "PYTHON", "CUDA_", "NVIDIA_", "MALLOC_", "DECORD_")
"""What a child gets to know of its parent's environment; not the keys to a store."""
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
            env={**_environment(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._unsent, self._lines, self._stderr = b"", bytearray(), b""
        self._talks: list[int] = []
        self.ready = False
        """Whether it has finished starting."""
        self._start_deadline = time.monotonic() + START_TIMEOUT_S
        self.send(setup)

    def send(self, message: dict[str, Any]) -> None:
        """Write one line; `receive` sees to what the pipe has no room for, and notices a dead child."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        assert self._process.stdin is not None
        try:
            written = os.write(self._process.stdin.fileno(), self._unsent)
        except BlockingIOError:
            return
        except BrokenPipeError:
            written = len(self._unsent)
        self._unsent = self._unsent[written:]

    def receive(self, deadline: float) -> bytes | None:
        """The next line, None once the child is gone; TimeoutError past `deadline` (monotonic seconds),
        BadAnswer for a line that does not end.

        Until `ready` is set the child has START_TIMEOUT_S instead. What it said in time, while the parent did
        other things, is still heard.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = process.stdout.fileno(), process.stderr.fileno()
        self._talks = self._talks or [out, err]
        limit = deadline if self.ready else self._start_deadline
        looked, searched = False, 0
        while (end := self._lines.find(b"\n", searched)) < 0:
            searched = len(self._lines)
            if searched > LINE_BYTES:
                raise BadAnswer("an answer without end")
            left_s = limit - time.monotonic()
            if left_s < 0 and looked:
                raise TimeoutError
            unsent = [process.stdin] if self._unsent else []
            heard, room, _ = select.select(self._talks, unsent, [], max(0.0, left_s))
            if room:
                self._write()
            elif not heard:
                raise TimeoutError
            if not looked:
                looked, limit = True, max(limit, time.monotonic() + GRACE_S) if left_s < 0 else limit
            if err in heard:
                data = os.read(err, 65536)
                self._stderr = (self._stderr + data)[-STDERR_BYTES:]
                if not data:
                    self._talks = [out]
            if out in heard:
                data = os.read(out, 65536)
                if not data:
                    return None
                self._lines += data
        line = bytes(self._lines[:end])
        del self._lines[: end + 1]
        return line

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
        how = f"exit code {code}"
        if code < 0:
            known = -code in signal.valid_signals()
            how = f"signal {signal.Signals(-code).name if known else -code}"
        said = plain(self._stderr.decode(errors="replace")).strip()
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


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name in _ENVIRONMENT or name.startswith(_ENVIRONMENT_OF)
    }
