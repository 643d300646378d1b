"""Shards of a dataset in an object store: byte ranges in, filled buffers out, through a cache folder.

The ranges of a sample, the large ones in pieces, are asked for at once; what fails for now is asked for
again. With a cache folder whole payloads are fetched, so that a window of one fills it for the next; without
one only what is wanted crosses the network. Any number of threads reads at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from schemas.codec import checksum
from schemas.patience import patiently
from schemas.store import is_remote, location
from trainer.cache import Cache
from trainer.shards import LocalShards, Part, Shards

PIECE_BYTES = 8 * 2**20
"""Longer ranges are fetched in pieces of this size at once; one connection is rarely all of the network."""


def open_shards(dataset: str | Path, *, cache: str, cache_bytes: int) -> Shards:
    """The shards of a dataset, wherever it lies; `cache`: folder for what comes from a store, or empty."""
    root = location(dataset)
    if not is_remote(root):
        return LocalShards(root)
    return RemoteShards(root, cache=Cache(Path(cache), max_bytes=cache_bytes) if cache else None)


class RemoteShards:
    """Shards below a URL."""

    def __init__(self, root: Path, *, cache: Cache | None) -> None:
        self._root, self._cache = root, cache

    def fill(self, parts: Sequence[Part]) -> list[int | OSError]:
        got: list[int | OSError] = [0] * len(parts)
        wanted = []
        for i, part in enumerate(parts):
            if self._cache and self._cache.read(self._name(part), part):
                got[i] = len(part.into)
            else:
                wanted.append(i)
        try:
            fetched = self._fetch([self._span(parts[i]) for i in wanted])
        except OSError as error:
            for i in wanted:
                got[i] = error
            return got
        for i, data in zip(wanted, fetched, strict=True):
            part = parts[i]
            if self._cache and len(data) == part.payload.nbytes:
                if (found := checksum(data)) == part.payload.checksum:
                    self._cache.add(self._name(part), data)
                else:
                    got[i] = OSError(f"it has {found}, the index says {part.payload.checksum}")
                    continue
            window = memoryview(data)[part.start :][: len(part.into)] if self._cache else memoryview(data)
            part.into[: len(window)] = window
            got[i] = len(window)
        return got

    def close(self) -> None:
        """Nothing is held open."""

    def _name(self, part: Part) -> str:
        """Of the payload in the cache: what it is and where it is from."""
        payload = part.payload
        return f"{self._root}\n{payload.shard}\n{payload.offset}\n{payload.nbytes}\n{payload.checksum}"

    def _span(self, part: Part) -> tuple[Path, int, int]:
        """The range to ask for."""
        payload = part.payload
        start, nbytes = (0, payload.nbytes) if self._cache else (part.start, len(part.into))
        return self._root / payload.shard, payload.offset + start, payload.offset + start + nbytes

    def _fetch(self, spans: list[tuple[Path, int, int]]) -> list[bytes]:
        """The bytes of ranges, all asked for at once; OSError where one cannot be had."""
        if not spans:
            return []
        pieces = [list(_pieces(start, end)) for _, start, end in spans]
        remote: Any = self._root
        keys = [cast(Any, path).path for (path, _, _), cut in zip(spans, pieces, strict=True) for _ in cut]
        starts, ends = zip(*(piece for cut in pieces for piece in cut), strict=True)

        def attempt() -> list[bytes]:
            return list(remote.fs.cat_ranges(keys, list(starts), list(ends), on_error="raise"))

        data = iter(patiently(self._root, attempt))
        return [b"".join(next(data) for _ in cut) for cut in pieces]


def _pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    for first in range(start, end, PIECE_BYTES):
        yield first, min(first + PIECE_BYTES, end)
