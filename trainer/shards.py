"""Shards of a dataset in a folder: byte ranges in, filled buffers out, by `preadv`.

Shards stay open, the ones used last. Any number of threads reads at once; a shard that is put away while
another thread reads it is closed when that one is done. The trade-off: what is open counts against the
process's limit of files.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

MAX_OPEN_SHARDS = 64
"""Two groups of 16 shards in each of the two families."""


@dataclass(frozen=True, slots=True)
class Payload:
    """One stored tensor, whole."""

    shard: str
    """Relative to the dataset."""
    offset: int
    """Bytes from the start of the shard."""
    nbytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Part:
    """A run of bytes of a payload, and where they are wanted."""

    payload: Payload
    start: int
    """Bytes from the start of the payload."""
    into: memoryview


class Shards(Protocol):
    """Where the bytes come from. Thread-safe."""

    def fill(self, parts: Sequence[Part]) -> list[int | OSError]:
        """Fill each `into`; how many bytes there were for each, fewer where a shard ends, or why none."""
        ...

    def close(self) -> None:
        """Let go of what is open; used again, it is opened again."""
        ...


class LocalShards:
    """Shards below a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = Lock()
        self._open: OrderedDict[str, _Open] = OrderedDict()

    def fill(self, parts: Sequence[Part]) -> list[int | OSError]:
        return [self._read(part) for part in parts]

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _read(self, part: Part) -> int | OSError:
        """A single read may stop early: it is continued until the file ends."""
        view, offset, got = part.into, part.payload.offset + part.start, 0
        try:
            shard = self._shard(part.payload.shard)
            while got < len(view) and (read := os.preadv(shard.fd, [view[got:]], offset + got)):
                got += read
        except OSError as error:
            return error
        return got

    def _shard(self, name: str) -> _Open:
        with self._lock:
            if name not in self._open:
                opened = _Open(self._root / name)
                if len(self._open) == MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
                self._open[name] = opened
            self._open.move_to_end(name)
            return self._open[name]


class _Open:
    """A file descriptor that is closed with its last user, whichever thread that is."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):  # not where it could not be opened
            os.close(self.fd)
