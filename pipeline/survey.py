"""What will become of each row, without decoding it: one look a row, in parallel, in sandboxed children.

`validate`, `plan` and `preprocess` read this stream. In: rows, as they come. Out: the same rows in order,
each with what it makes or why it cannot be used; memory does not grow with the manifest. A child keeps
the file it opened last, so neighbouring rows of one file go to one child, a few at a time so that a
long file with many windows still fills all children. The captions of one window share one look.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue

from pipeline.clip import Placed
from pipeline.fetch import Fetcher
from pipeline.sandbox import DecodeRequest, DecoderProcess, decode_settings
from schemas.config import PreprocessConfig
from schemas.errors import ClipError, RunError
from schemas.manifest import ManifestRow
from schemas.manifest_cells import MAX_CAPTIONS

_NEIGHBOURS = 16
"""Rows of one file that go to a child together."""
_AHEAD = 64
"""Rows per child that are looked at ahead of the reader."""


def survey(
    rows: Iterable[ManifestRow], config: PreprocessConfig, *, full: bool = False
) -> Iterator[tuple[ManifestRow, Placed | ClipError]]:
    """Every row in order with what will become of it, or why it cannot become a sample.

    `full` decodes every picture of its window. RunError where the children do not work at all.
    """
    workers = os.cpu_count() or 1
    idle: SimpleQueue[DecoderProcess] = SimpleQueue()

    fetcher = Fetcher(config.sources, config.limits)

    def place(run: list[ManifestRow]) -> list[Placed | ClipError]:
        try:
            local = fetcher.local(run[0].path)
        except ClipError as error:
            return [error] * len(run)
        except OSError as error:
            raise RunError(f"{run[0].path} cannot be fetched now: {error}") from error
        child = idle.get()
        try:
            found: dict[tuple[float | None, float | None], Placed | ClipError] = {}
            for row in run:
                if (row.start_s, row.end_s) not in found:
                    found[row.start_s, row.end_s] = _place(child, local.path, row, full=full)
            return [found[row.start_s, row.end_s] for row in run]
        finally:
            idle.put(child)
            local.close()

    with ExitStack() as stack:
        settings = decode_settings(config)
        for _ in range(workers):
            idle.put(stack.enter_context(DecoderProcess(**settings)))
        pool = ThreadPoolExecutor(workers)
        stack.callback(pool.shutdown, cancel_futures=True)
        ahead: deque[tuple[list[ManifestRow], Future[list[Placed | ClipError]]]] = deque()
        waiting = 0
        for run in _runs(rows):
            ahead.append((run, pool.submit(place, run)))
            waiting += len(run)
            while waiting >= _AHEAD * workers:
                first, found = ahead.popleft()
                waiting -= len(first)
                yield from zip(first, found.result(), strict=True)
        while ahead:
            first, found = ahead.popleft()
            yield from zip(first, found.result(), strict=True)


def _place(child: DecoderProcess, path: str, row: ManifestRow, *, full: bool) -> Placed | ClipError:
    try:
        return child.place(DecodeRequest(path, start_s=row.start_s, end_s=row.end_s), full=full)
    except ClipError as error:
        return error


def _runs(rows: Iterable[ManifestRow]) -> Iterator[list[ManifestRow]]:
    """Neighbouring rows of one file: `_NEIGHBOURS` together, or more where they share the last window."""
    run: list[ManifestRow] = []
    for row in rows:
        same = run and row.key[:3] == run[-1].key[:3]
        if run and (row.path != run[-1].path or len(run) >= (MAX_CAPTIONS if same else _NEIGHBOURS)):
            yield run
            run = []
        run.append(row)
    if run:
        yield run
