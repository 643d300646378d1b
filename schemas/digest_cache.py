"""Digests of large files, kept between commands: a path in, its sha256 out, read only when it changed.

A file is known by path, size, times of change and inode, in the user's cache folder. The trade-off: a file
that another machine rewrites, on a file system that does not tell so, is taken for the old one. What changed
in the last seconds is not kept, since a clock may not tell it from what it was.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SHA256 = re.compile(r"[0-9a-f]{64}")
_SETTLED_S = 10.0
"""Coarser than the clock of any file system."""
_AT_ONCE = 8

Stamp = tuple[str, int, int, int, int]
"""Path, bytes, times of change of content and of inode in nanoseconds, inode."""


def stamp(path: Path) -> Stamp:
    """What tells a file from another one without reading it; links are followed."""
    target = path.resolve()
    state = target.stat()
    return str(target), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


def file_digests(paths: Sequence[Path]) -> list[str]:
    """sha256 of each file, in hex; several are read at once, and none that is known."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(_digest, map(stamp, paths)))


@functools.lru_cache(maxsize=256)
def _digest(file: Stamp) -> str:
    path, _, *changed_ns, _ = file
    kept = _folder() / hashlib.sha256(repr(file).encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if SHA256.fullmatch(known := kept.read_text(encoding="ascii")):
            return known
    with open(path, "rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if time.time() - max(changed_ns) / 1e9 > _SETTLED_S:
        with contextlib.suppress(OSError):  # without it the file is read again the next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_name(f"{kept.name}.{os.getpid()}")
            temporary.write_text(found, encoding="ascii")
            temporary.replace(kept)
    return found


def _folder() -> Path:
    """As https://specifications.freedesktop.org/basedir-spec has it."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return root / "latentpress" / "sha256"
