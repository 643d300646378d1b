"""Clips of a unit -> batches by shape -> moments, one batch with the encoder at a time.

Each clip is copied from its decoder's slot into a buffer of the encoder and the slot is handed back, so that
decoding and filling the next batch go on while one is encoded. Which clips share a batch follows from the
order of the rows alone, never from who was faster. A batch is begun before it is full where a rare shape
would hold back too much: what was encoded after its first clip waits for it, as rows are written in order.

F frames, H, W pixels of a clip.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Self, TypeVar

import numpy as np

from pipeline.encoders import Encoders, Shape, starving
from pipeline.video_encode import Moments, VideoEncoder

HELD_BYTES = 2**30
"""Of frames, from the first clip of a batch that is not full to the last clip taken; latents are smaller."""
Item = TypeVar("Item")


@dataclass
class _Batch(Generic[Item]):
    frames: np.ndarray
    """uint8 [B, F, H, W, 3], of which as many are filled as there are items."""
    tiled: bool
    opened: int
    """Bytes of frames taken before it."""
    items: list[Item] = field(default_factory=list)


class Batches(Generic[Item]):
    """The clips of one unit on their way through the encoder; a context manager.

    `done` takes the items of a batch with their moments, on a thread of this object; an error of it, or
    Starved, comes out of a later call.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        encoders: Encoders,
        *,
        done: Callable[[list[Item], Moments], None],
        encoded: Callable[[float, int], None],
    ) -> None:
        """`encoders` says how many clips fit at once; `encoded` takes the seconds and clips of a batch."""
        self._encoder, self._encoders, self._done, self._encoded = encoder, encoders, done, encoded
        self._open: dict[Shape, _Batch[Item]] = {}
        """In the order of their first clips."""
        self._taken = 0
        self._under_way: Future[tuple[float, int]] | None = None
        self._collector = ThreadPoolExecutor(1, thread_name_prefix="latentpress-collect")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._collector.shutdown()  # what is with the encoder ends first

    def add(self, item: Item, frames: np.ndarray, *, tiled: bool) -> None:
        """Copy a clip, uint8 [F, H, W, 3]; blocks while a full batch waits for the one before it."""
        shape: Shape = frames.shape[:3]
        if shape in self._open and self._open[shape].tiled != tiled:
            self._begin(shape)  # the encoder has two buffers of a shape
        if shape not in self._open:
            size = self._encoders.clips_at_once(shape)
            with starving("latents", count=size, shape=shape, tiled=tiled):
                buffer = self._encoder.buffer(size, shape)
            self._open[shape] = _Batch(buffer, tiled, self._taken)
        batch = self._open[shape]
        np.copyto(batch.frames[len(batch.items)], frames)
        batch.items.append(item)
        self._taken += frames.nbytes
        if len(batch.items) == len(batch.frames):
            self._begin(shape)
        while self._open:
            shape, oldest = next(iter(self._open.items()))
            if self._taken - oldest.opened <= max(HELD_BYTES, oldest.frames.nbytes):
                return
            self._begin(shape)

    def finish(self) -> None:
        """Encode what is left, and wait for all of it."""
        while self._open:
            self._begin(next(iter(self._open)))
        self._settle()

    def _begin(self, shape: Shape) -> None:
        batch = self._open.pop(shape)
        self._settle()
        started = time.perf_counter()
        count = len(batch.items)
        with starving("latents", count=count, shape=shape, tiled=batch.tiled):
            moments = self._encoder.begin(batch.frames[:count], tiled=batch.tiled)

        def collect() -> tuple[float, int]:
            with starving("latents", count=count, shape=shape, tiled=batch.tiled):
                found = moments()
            seconds = time.perf_counter() - started
            self._done(batch.items, found)
            return seconds, count

        self._under_way = self._collector.submit(collect)

    def _settle(self) -> None:
        """Wait for the batch that is with the encoder."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            self._encoded(*under_way.result())
