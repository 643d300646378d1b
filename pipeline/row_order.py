"""What rows become, written in the order of the rows on a thread of its own.

Batches end in another order than that of their rows, and a shard's bytes follow from its rows alone: what
comes early is held until its turn. Who hands over more than can be written waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Self, TypeVar

_AHEAD = 2
"""Batches (or single rows) handed over and not yet written or held."""
Outcome = TypeVar("Outcome")


class RowOrder(Generic[Outcome]):
    """Takes the outcomes of rows numbered from 0 in any order, from any thread; a context manager."""

    def __init__(self, write: Callable[[int, Outcome], None]) -> None:
        """`write` is called for every row in order, on one thread."""
        self._write = write
        self._held: dict[int, Outcome] = {}
        self._next = 0
        self._error: Exception | None = None
        self._room = threading.BoundedSemaphore(_AHEAD)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="latentpress-write")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writer.shutdown(cancel_futures=kind is not None)

    def put(self, rows: Sequence[tuple[int, Callable[[], Outcome]]]) -> None:
        """Hand over rows, with what makes their outcomes, which runs on the writer's thread too.

        Raises what went wrong with rows handed over before.
        """
        self._room.acquire()
        if self._error is not None:
            self._room.release()
            raise self._error
        self._writer.submit(self._take, rows)

    def finish(self) -> None:
        """Wait until everything is written; raises what went wrong."""
        self._writer.shutdown()
        if self._error is not None:
            raise self._error
        assert not self._held, f"rows never handed over: before {sorted(self._held)}"

    def _take(self, rows: Sequence[tuple[int, Callable[[], Outcome]]]) -> None:
        try:
            if self._error is None:
                for number, make in rows:
                    self._held[number] = make()
                while self._next in self._held:
                    self._write(self._next, self._held.pop(self._next))
                    self._next += 1
        except Exception as error:
            self._error = error
        finally:
            self._room.release()
