"""Every call of this process that changes files below one folder: counted, recorded, or made to go wrong.

In: a folder and a `Plan`. Out: the calls in order, or a death, a stop or an error at one of them. Python's
own calls are wrapped (`open`, `os.write`, `os.fsync`, `os.rename` ...), which sees what Python writes and
nothing that a C library writes by itself; so a test holds the recorded calls against the real folder. Linux.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

Kind = Literal["create", "write", "truncate", "sync", "rename", "link", "unlink", "mkdir", "failed"]
T = TypeVar("T")


class Op(NamedTuple):
    """One call; paths are relative to the tapped folder, which is "."."""

    kind: Kind
    path: str
    target: str = ""
    """The new name of a rename or link."""
    offset: int = 0
    """Where `data` was written, or the size a file was cut to."""
    data: bytes = b""


@dataclass(frozen=True)
class Plan:
    """What goes wrong, and when; nothing by default."""

    at: int | None = None
    """Number of the call, from 0."""
    action: Literal["before", "half", "after", "stop", "error"] = "before"
    """`before`, `after`: SIGKILL there. `half`: half of the bytes are written, then SIGKILL. `stop`: SIGSTOP
    before the call. `error`: `error` is raised in its place."""
    error: int = errno.EIO
    lasts: bool = False
    """With `error`: later calls fail too, as on a full or a read-only disk."""
    sabotage: str = ""
    """A broken protocol of `sabotage` to run under."""


class Tap:
    """Wraps the calls of this process, for the rest of its life."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder, self._plan = os.path.realpath(folder), plan
        self._lock = threading.RLock()
        self.ops: list[Op] = []

    def install(self) -> None:
        for name, through in (
            ("rename", self._two_names("rename")),
            ("replace", self._two_names("rename")),
            ("link", self._two_names("link")),
            ("unlink", self._one_name("unlink")),
            ("remove", self._one_name("unlink")),
            ("mkdir", self._one_name("mkdir")),
            ("fsync", self._one_name("sync")),
            ("fdatasync", self._one_name("sync")),
            ("write", self._write),
            ("pwrite", self._write),
            ("open", self._open),
            ("truncate", self._truncate),
            ("ftruncate", self._truncate),
        ):
            self._wrap(name, through)
        plain = io.open

        def tapped(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wxa+") or self._below(file) is None:
                return plain(file, mode, *args, **kwargs)
            return _open_file(self, file, mode, *args, **kwargs)

        io.open = builtins.open = tapped
        if self._plan.action == "error":  # what a retry does is of interest, not how long it waits first
            sleep = time.sleep
            time.sleep = lambda seconds: sleep(min(float(seconds), 0.01))

    def call(self, op: Op, do: Callable[[], T], half: Callable[[], object] | None = None) -> T:
        """Make one call, or let it go wrong as planned."""
        with self._lock:
            plan, number = self._plan, len(self.ops)
            self.ops.append(Op("failed", op.path))  # unless it succeeds
            here = number == plan.at
            if here and plan.action in ("before", "half"):
                if half is not None and plan.action == "half":
                    half()
                os.kill(os.getpid(), signal.SIGKILL)
            if here and plan.action == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            later = plan.lasts and plan.at is not None and number > plan.at
            if plan.action == "error" and (here or later) and _can_fail(op, plan.error):
                raise OSError(plan.error, os.strerror(plan.error), op.path)
            try:
                result = do()
            finally:
                if here and plan.action == "after":
                    os.kill(os.getpid(), signal.SIGKILL)
            self.ops[number] = op
            return result

    def _wrap(self, name: str, through: Callable[..., Any]) -> None:
        plain = getattr(os, name)
        setattr(os, name, lambda *args, **kwargs: through(plain, *args, **kwargs))

    def _below(self, path: Any) -> str | None:
        """`path`, or what a descriptor stands for, relative to the folder; None outside of it."""
        if isinstance(path, int):
            whole = os.readlink(f"/proc/self/fd/{path}")
        else:  # links in the way are followed, a link itself is what is meant
            parent, name = os.path.split(os.path.abspath(os.fsdecode(path)))
            whole = os.path.join(os.path.realpath(parent), name)
        if whole == self._folder:
            return "."
        return os.path.relpath(whole, self._folder) if whole.startswith(self._folder + "/") else None

    def _one_name(self, kind: Kind) -> Callable[..., Any]:
        def through(plain: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
            below = self._below(path)
            if below is None or (kind == "mkdir" and os.path.isdir(path)):
                return plain(path, *args, **kwargs)
            return self.call(Op(kind, below), lambda: plain(path, *args, **kwargs))

        return through

    def _two_names(self, kind: Kind) -> Callable[..., Any]:
        def through(plain: Callable[..., Any], path: Any, target: Any, **kwargs: Any) -> Any:
            below, new = self._below(path), self._below(target)
            if new is None:
                return plain(path, target, **kwargs)
            assert below is not None, f"{path} comes from outside of the folder"
            return self.call(Op(kind, below, new), lambda: plain(path, target, **kwargs))

        return through

    def _write(self, plain: Callable[..., int], fd: int, data: Any, *at: int) -> int:
        below = self._below(fd)
        if below is None:
            return plain(fd, data, *at)
        offset = at[0] if at else os.lseek(fd, 0, os.SEEK_CUR)
        view = memoryview(data).cast("B")
        op = Op("write", below, offset=offset, data=bytes(view))
        return self.call(op, lambda: plain(fd, data, *at), lambda: plain(fd, view[: len(view) // 2], *at))

    def _open(self, plain: Callable[..., int], path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        below = self._below(path)
        if below is None or not flags & os.O_CREAT:
            return plain(path, flags, *args, **kwargs)
        return self.call(Op("create", below), lambda: plain(path, flags, *args, **kwargs))

    def _truncate(self, plain: Callable[..., None], path: Any, length: int) -> None:
        below = self._below(path)
        if below is None:
            return plain(path, length)
        return self.call(Op("truncate", below, offset=length), lambda: plain(path, length))


def _can_fail(op: Op, error: int) -> bool:
    """Whether a full disk (or, for other errors, any disk) can refuse this call."""
    return error != errno.ENOSPC or op.kind in ("create", "write", "rename", "link", "mkdir")


class _RawFile(io.FileIO):
    """The unbuffered file under what `open` gives: its writes are those that reach the system."""

    def __init__(self, tap: Tap, file: Any, mode: str, closefd: bool, opener: Any) -> None:
        self._tap = tap
        below = tap._below(file)
        assert below is not None

        def start() -> None:
            super(_RawFile, self).__init__(file, mode, closefd, opener)

        if isinstance(file, int) or (os.path.exists(file) and "w" not in mode):
            start()
        else:
            tap.call(Op("create", below), start)

    def write(self, data: Any) -> int:
        below = self._tap._below(self.fileno())
        assert below is not None
        view = memoryview(data).cast("B")
        offset = os.fstat(self.fileno()).st_size if "a" in self.mode else self.tell()
        plain = super().write
        op = Op("write", below, offset=offset, data=bytes(view))
        return self._tap.call(op, lambda: plain(view), lambda: plain(view[: len(view) // 2]))

    def truncate(self, size: int | None = None) -> int:
        below = self._tap._below(self.fileno())
        assert below is not None
        size, plain = self.tell() if size is None else size, super().truncate
        return self._tap.call(Op("truncate", below, offset=size), lambda: plain(size))


def _open_file(
    tap: Tap,
    file: Any,
    mode: str,
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Any = None,
) -> Any:
    """`io.open` for a file that is written, on top of a `_RawFile`."""
    raw = _RawFile(tap, file, mode.replace("b", "").replace("t", ""), closefd, opener)
    if buffering == 0:
        return raw
    size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
    buffered = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
    if "b" in mode:
        return buffered
    return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
