"""A folder that keeps what was fetched, up to a bound: named payloads in, their bytes out.

What was used longest ago goes first. Several processes use it at once, and any of them may be killed at any
time: files appear whole, by a rename, and what they take together is counted in a file of its own under a
lock, before the rename, so that a kill leaves it counted too high and never too low. Counting anew is part of
making room. Nothing is synced to the disk: a file that a crash of the machine damages is told by its checksum
and fetched again. So a process reads whole what others have kept, once, also where it wants a window.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from schemas.codec import checksum
from schemas.errors import ConfigError
from trainer.shards import Part

_KEPT = 0.9
"""Share of the bound that is kept when room is made, so that not every payload has to make some."""
_ABANDONED_S = 3600.0
"""Age at which a file that was not finished is known to be of a process that is gone."""
_COUNT, _TEMPORARY = "bytes", ".tmp-"


class _File(NamedTuple):
    used: float
    """When, in seconds since 1970."""
    nbytes: int
    path: str


class Cache:
    """Payloads in a folder of at most `max_bytes`, and what is being written. Thread-safe, process-safe."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        """ConfigError where the folder cannot be written."""
        self._folder, self._max_bytes = folder.absolute(), max_bytes
        self._full = False
        self._intact = set[str]()  # names whose file this process has written, or found to be whole
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked() as count:
                self._make_room(count, 0)
        except OSError as error:
            raise ConfigError(
                f"data.cache = {str(folder)!r} cannot be written: {error.strerror}; give a folder of this "
                "machine, or none"
            ) from error

    def read(self, name: str, part: Part) -> bool:
        """Fill `part.into`; whether the payload is here. It is held against its checksum where it is wanted
        whole, and before any of it is taken for the first time."""
        path, payload = self._path(name), part.payload
        whole = len(part.into) == payload.nbytes
        try:
            with path.open("rb", buffering=0) as file:
                intact = whole or name in self._intact or checksum(file.readall()) == payload.checksum
                file.seek(part.start)
                got = file.readinto(part.into)
                os.utime(file.fileno())
        except OSError:
            return False
        if got == len(part.into) and (checksum(part.into) == payload.checksum if whole else intact):
            self._intact.add(name)
            return True
        with contextlib.suppress(OSError):
            path.unlink()
        return False

    def add(self, name: str, data: bytes) -> None:
        """Keep a payload; one that is larger than the bound is not kept. A disk that refuses is said once."""
        if len(data) > self._max_bytes * _KEPT or self._full:
            return
        path = self._path(name)
        temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{threading.get_ident()}-{path.name}")
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(data)
            with self._locked() as count:
                if path.exists():  # another process was faster
                    temporary.unlink()
                    return
                self._count(count, len(data))
                temporary.replace(path)
                self._intact.add(name)
        except OSError as error:
            self._full = True
            with contextlib.suppress(OSError):
                temporary.unlink()
            print(f"nothing more is kept in data.cache: {error}", file=sys.stderr, flush=True)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self._folder / digest[:2] / digest

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The count, open and ours alone: a lock of this open file, so threads wait for each other too."""
        file = os.open(self._folder / _COUNT, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)

    def _count(self, count: int, nbytes: int) -> None:
        """Count `nbytes` more, and make room where that is too much."""
        held = int.from_bytes(os.pread(count, 8, 0), "little")
        if held + nbytes > self._max_bytes:
            self._make_room(count, nbytes)
        else:
            os.pwrite(count, (held + nbytes).to_bytes(8, "little"), 0)

    def _make_room(self, count: int, nbytes: int) -> None:
        """Delete what was used longest ago until `nbytes` more fit; counts all files anew."""
        files = sorted(self._files())
        held = sum(file.nbytes for file in files)
        if held + nbytes > self._max_bytes:
            for file in files:
                if held + nbytes <= self._max_bytes * _KEPT:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.path)
                held -= file.nbytes
        os.pwrite(count, (held + nbytes).to_bytes(8, "little"), 0)

    def _files(self) -> Iterator[_File]:
        """What is kept; unfinished files of processes that are gone are deleted on the way."""
        for folder in self._folder.glob("??"):
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    state = entry.stat()
                    if not entry.name.startswith(_TEMPORARY):
                        yield _File(state.st_mtime, state.st_size, entry.path)
                    elif time.time() - state.st_mtime > _ABANDONED_S:
                        os.unlink(entry.path)
