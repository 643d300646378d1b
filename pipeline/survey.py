"""What is in the files, without decoding: one probe a row, in parallel, in sandboxed children.

`validate` and `plan` both read this stream; memory does not grow with the manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue

from pipeline.clip import ClipInfo
from pipeline.frames import check_window
from pipeline.sandbox import DecoderProcess
from schemas.config import PreprocessConfig
from schemas.errors import ClipError
from schemas.manifest import ManifestRow

_WINDOW = 256
"""Rows probed ahead of the reader."""


def survey(
    rows: Iterable[ManifestRow], config: PreprocessConfig
) -> Iterator[tuple[ManifestRow, ClipInfo | ClipError]]:
    """Every row in order with what its file says of itself, or why it cannot become a sample."""
    workers = os.cpu_count() or 1
    idle: SimpleQueue[DecoderProcess] = SimpleQueue()

    def probe(row: ManifestRow) -> ClipInfo | ClipError:
        child = idle.get()
        try:
            info = child.probe(row.path)
            check_window(info, start_s=row.start_s, end_s=row.end_s)
            return info
        except ClipError as error:
            return error
        finally:
            idle.put(child)

    with ExitStack() as stack:
        for _ in range(workers):
            idle.put(
                stack.enter_context(
                    DecoderProcess(
                        frames=config.frames,
                        buckets=config.buckets,
                        resize=config.resize,
                        limits=config.limits,
                    )
                )
            )
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        ahead: list[tuple[ManifestRow, Future[ClipInfo | ClipError]]] = []
        for row in rows:
            ahead.append((row, pool.submit(probe, row)))
            if len(ahead) >= _WINDOW:
                first, found = ahead.pop(0)
                yield first, found.result()
        for first, found in ahead:
            yield first, found.result()
