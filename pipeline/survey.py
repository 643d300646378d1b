"""What is in the files, without decoding: one probe a row, in parallel, in sandboxed children.

`validate` and `plan` both read this stream; memory does not grow with the manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue

from pipeline.clip import ClipInfo
from pipeline.frames import check_window, num_available
from pipeline.sandbox import DecoderProcess
from schemas.bucket import choose_bucket
from schemas.config import BucketConfig, PreprocessConfig
from schemas.errors import ClipError
from schemas.manifest import ManifestRow

_WINDOW = 256
"""Rows probed ahead of the reader."""


@dataclass(frozen=True)
class Surveyed:
    """A row that can become a sample."""

    info: ClipInfo
    bucket: BucketConfig
    num_available: int
    """About how many frames its window fills without repeating or blending."""


def survey(
    rows: Iterable[ManifestRow], config: PreprocessConfig
) -> Iterator[tuple[ManifestRow, Surveyed | ClipError]]:
    """Every row in order with what will become of it, or why it cannot become a sample."""
    workers = os.cpu_count() or 1
    idle: SimpleQueue[DecoderProcess] = SimpleQueue()

    def probe(row: ManifestRow) -> Surveyed | ClipError:
        child = idle.get()
        try:
            return _place(row, child.probe(row.path), config)
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
        ahead: list[tuple[ManifestRow, Future[Surveyed | ClipError]]] = []
        for row in rows:
            ahead.append((row, pool.submit(probe, row)))
            if len(ahead) >= _WINDOW:
                first, found = ahead.pop(0)
                yield first, found.result()
        for first, found in ahead:
            yield first, found.result()


def _place(row: ManifestRow, info: ClipInfo, config: PreprocessConfig) -> Surveyed:
    """The bucket of a row's window; ClipError where the window is empty or refused as too short."""
    check_window(info, start_s=row.start_s, end_s=row.end_s)
    window_s = min(row.end_s or info.duration_s, info.duration_s) - (row.start_s or 0.0)
    share = window_s / info.duration_s if info.duration_s else 1.0
    pictures = num_available(window_s, max(1, round(info.num_pictures * share)), frames=config.frames)
    position = choose_bucket(
        config.buckets, width=info.display_width, height=info.display_height, num_pictures=pictures
    )
    bucket = config.buckets[position]
    if pictures < bucket.num_frames and config.frames.short in ("drop", "error"):
        raise ClipError(
            "too_short",
            f"about {pictures} frames where the bucket asks for {bucket.num_frames} "
            f"(frames.short = {config.frames.short!r})",
        )
    return Surveyed(info, bucket, pictures)
