"""Files of the same content under several names, found while a manifest streams by.

In: rows twice, first when they are read and again, in the same order, when they have been looked at. Out:
the earlier row that asks for the same sample. Only files of equal size are read, in threads, between
the two.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from pipeline.source import content_digest
from schemas.ledger import Ledger
from schemas.manifest import ManifestRow

_MOST_READING = 1024
"""Files waiting to be read; the reader of the manifest waits for them above it."""


class Copies:
    """A context manager; all its calls from one thread."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._reading: deque[tuple[int, str, Future[str | None]]] = deque()
        """The row that asked, the file, its digest; in the order asked."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def watch(self, row: ManifestRow) -> None:
        """`row` has been read."""
        if not self._ledger.add_file(row.path):
            return
        try:
            size = os.stat(row.path).st_size
        except OSError:  # gone since the manifest was read: whoever opens it will say so
            return
        for path in self._ledger.to_compare(row.path, size):
            self._reading.append((row.number, path, self._pool.submit(_digest, path)))
        # Nobody asks for the first row of one that turns out bad: its digest is taken in here.
        while self._reading and (self._reading[0][2].done() or len(self._reading) > _MOST_READING):
            self._take_digest()

    def first_row(self, row: ManifestRow) -> tuple[int | None, str]:
        """The earlier row with the same content, window and caption, and the file that stands for the
        content of `row` (its own where no earlier one is the same)."""
        while self._reading and self._reading[0][0] <= row.number:
            self._take_digest()
        first = self._ledger.first_copy(row.path)
        return self._ledger.first_row("stored", (first, *row.key[1:]), row.number), first

    def _take_digest(self) -> None:
        _, path, digest = self._reading.popleft()
        found = digest.result()
        if found is not None:
            self._ledger.note_content(path, found)


def _digest(path: str) -> str | None:
    try:
        return content_digest(path)
    except OSError:
        return None
