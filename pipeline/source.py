"""What makes a source file the same file: a digest of its content, read only when it may have changed.

Size and mtime recorded beside the digest say when to look again; they are never the identity, so
copying, moving or touching a file makes nothing stale.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from schemas.errors import ClipError, ManifestError
from schemas.store import is_url

if TYPE_CHECKING:
    from pipeline.fetch import Fetcher

_SAMPLED_BLOCKS = 16
_SAMPLED_BYTES = 64 << 10


@dataclass(frozen=True)
class Source:
    """One file's identity, and the stat it was taken at."""

    digest: str
    size: int
    mtime_ns: int
    """Of a remote file, which has none: a number made of what its store tells it apart by."""


def identify(
    paths: Sequence[str],
    *,
    mode: Literal["content", "sampled"],
    known: Mapping[tuple[str, int, int], str],
    fetcher: Fetcher | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Source]:
    """The Source of every path; `known` maps (path, size, mtime_ns) to a digest taken before.

    Files are hashed in parallel (hashing releases the interpreter's lock), URLs read by `fetcher`.
    ManifestError lists every file that cannot be read.
    """

    def one(path: str) -> Source | str:
        try:
            if is_url(path) and fetcher is not None:
                return fetcher.digest(path, mode, known=known)
            stat = os.stat(path)
            digest = known.get((path, stat.st_size, stat.st_mtime_ns))
            if digest is None or not digest.startswith(mode):
                digest = f"{mode}:{content_digest(path) if mode == 'content' else sampled_digest(path)}"
            return Source(digest, stat.st_size, stat.st_mtime_ns)
        except (OSError, ClipError) as error:
            return f"{path}: {(isinstance(error, OSError) and error.strerror) or error}"

    unique = list(dict.fromkeys(paths))
    sources: dict[str, Source] = {}
    problems = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for done, (path, result) in enumerate(zip(unique, pool.map(one, unique), strict=True), 1):
            if isinstance(result, Source):
                sources[path] = result
            else:
                problems.append(result)
            progress(done)
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


def content_digest(path: str) -> str:
    """sha256 hex of all bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
