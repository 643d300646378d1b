"""What makes a source file the same file: a digest of its content, read only when it may have changed.

Size and mtime recorded beside the digest say when to look again; they are never the identity, so
copying, moving or touching a file makes nothing stale. What cannot become a sample is not read: a file over
`limits.max_bytes`, and a URL that is refused, get a digest that no content has, and their unit says why. They
are looked at again in every run, and get their own as soon as they can be read.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from schemas.config import LimitsConfig
from schemas.errors import ClipError, ManifestError
from schemas.store import is_url

if TYPE_CHECKING:
    from pipeline.fetch import Fetcher

_SAMPLED_BLOCKS = 16
_SAMPLED_BYTES = 64 << 10
_READ_BYTES = 1 << 20
_OVERSIZE = "oversize:"
_UNFETCHED = "unfetched:"
_UNREAD = (_OVERSIZE, _UNFETCHED)
_LIMITS = LimitsConfig()


@dataclass(frozen=True)
class Source:
    """One file's identity, and the stat it was taken at."""

    digest: str
    size: int
    mtime_ns: int
    """Of a remote file, which has none: a number made of what its store tells it apart by."""


class Halt:
    """Ends the reading of files in other threads; a file may take hours."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def ask(self) -> None:
        """From now on, every check raises."""
        self._asked.set()

    def check(self) -> None:
        """InterruptedError where the end was asked for."""
        if self._asked.is_set():
            raise InterruptedError("reading was ended")


def is_unread(source: Source) -> bool:
    """Whether this stands for a file that was not read, and cannot become a sample."""
    return source.digest.startswith(_UNREAD)


def identify(
    paths: Sequence[str],
    *,
    mode: Literal["content", "sampled"],
    known: Mapping[tuple[str, int, int], str],
    limits: LimitsConfig = _LIMITS,
    fetcher: Fetcher | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Source]:
    """The Source of every path; `known` maps (path, size, mtime_ns) to a digest taken before.

    Files are hashed in parallel (hashing releases the interpreter's lock), URLs read by `fetcher`.
    ManifestError lists every file that cannot be read now, and every URL that was fetched before and is
    refused now: its samples are not given up for that. An interrupt ends reading within a block.
    """
    halt = Halt()

    @functools.cache
    def fetched_before() -> set[str]:
        return {
            path for (path, _, _), digest in known.items() if is_url(path) and not digest.startswith(_UNREAD)
        }

    def one(path: str) -> Source | str:
        try:
            halt.check()
            if is_url(path) and fetcher is not None:
                return fetcher.digest(path, mode, known=known, halt=halt)
            stat = os.stat(path)
            digest = known.get((path, stat.st_size, stat.st_mtime_ns))
            if digest is None or not digest.startswith(mode):
                if stat.st_size > limits.max_bytes:
                    digest = f"{_OVERSIZE}{stat.st_size}"
                elif mode == "content":
                    digest = f"content:{content_digest(path, halt=halt)}"
                else:
                    digest = f"sampled:{sampled_digest(path)}"
            return Source(digest, stat.st_size, stat.st_mtime_ns)
        except ClipError as error:
            if path in fetched_before():
                return f"{path} was fetched before, and now: {error}"
            return Source(f"{_UNFETCHED}{hashlib.sha256(path.encode()).hexdigest()}", 0, 0)
        except OSError as error:
            return f"{path}: {error.strerror or error}"

    unique = list(dict.fromkeys(paths))
    sources: dict[str, Source] = {}
    problems = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        try:
            for done, (path, result) in enumerate(zip(unique, pool.map(one, unique), strict=True), 1):
                if isinstance(result, Source):
                    sources[path] = result
                else:
                    problems.append(result)
                progress(done)
        except BaseException:
            halt.ask()
            raise
    if problems:
        raise ManifestError(f"{len(problems)} of {len(unique)} videos cannot be read", problems)
    return sources


def same_content(path: str, source: Source) -> bool:
    """Whether `path` still is the file that `source` was taken of; reads it only where its stat differs.

    OSError where that cannot be told now, such as on a failing disk.
    """
    try:
        stat = os.stat(path)
        if (stat.st_size, stat.st_mtime_ns) == (source.size, source.mtime_ns):
            return True
        mode, _, digest = source.digest.partition(":")
        return digest == (content_digest(path) if mode == "content" else sampled_digest(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def content_digest(path: str, *, halt: Halt | None = None) -> str:
    """sha256 hex of all bytes; InterruptedError where `halt` ends it."""
    state, block = hashlib.sha256(), memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            if halt is not None:
                halt.check()
            state.update(block[:count])
    return state.hexdigest()


def sampled_digest(path: str) -> str:
    """sha256 hex of the size, head, tail and evenly spaced blocks, for stores too large to read twice."""
    state = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        state.update(size.to_bytes(8, "little"))
        last = max(0, size - _SAMPLED_BYTES)
        for block in range(_SAMPLED_BLOCKS):
            offset = last * block // (_SAMPLED_BLOCKS - 1)
            state.update(os.pread(file.fileno(), _SAMPLED_BYTES, offset))
    return state.hexdigest()
