"""Clips of a unit -> batches by shape -> moments, one batch with the encoder at a time.

Each clip is copied from its decoder's slot into a buffer of the encoder and the slot is handed back. The
encoder has a thread of its own, so that decoding and filling the next batch go on while it works, also where
it keeps its caller busy until it is done. Which clips share a batch follows from the order of the rows alone,
never from who was faster. The oldest batch is begun before it is full where more clips wait, in batches of
all shapes, than it takes, so that the encoder need not wait for the last row of a unit; and where what was
encoded after its first clip would be too much to hold, as rows are written in order. The price: such batches
are smaller than the encoder could take.

F frames, H, W pixels of a clip.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Self, TypeVar

import numpy as np

from pipeline.encoders import Encoders, Shape, starving
from pipeline.video_encode import Moments, VideoEncoder

HELD_BYTES = 2**31
"""Of frames: what all batches that are not full have room for, and what is taken from the first clip of one
until it is begun, unless a single batch is larger."""
Item = TypeVar("Item")


class Spent(NamedTuple):
    """Where the encoder's time went with a batch."""

    waited_s: float
    """For clips, since the batch before it was handed over, or since there are batches."""
    busy_s: float
    clips: int


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

    `done` takes the items of a batch with their moments, on the encoder's thread; an error of it, or Starved,
    comes out of a later call, and nothing is begun after it.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        encoders: Encoders,
        *,
        done: Callable[[list[Item], Moments], None],
        encoded: Callable[[Spent], None],
    ) -> None:
        """`encoders` says how many clips fit at once, and has the thread; `encoded` hears of every batch."""
        self._encoder, self._encoders, self._done, self._encoded = encoder, encoders, done, encoded
        self._open: dict[Shape, _Batch[Item]] = {}
        """In the order of their first clips."""
        self._taken = 0
        self._begun: deque[Future[Spent]] = deque()
        self._failed = False
        self._idle_since = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._begun:
            each.cancel()
        wait(self._begun)  # what is with the encoder ends first

    def add(self, item: Item, frames: np.ndarray, *, tiled: bool) -> None:
        """Copy a clip, uint8 [F, H, W, 3]; blocks while a full batch waits for the one before it."""
        shape: Shape = frames.shape[:3]
        if shape in self._open and self._open[shape].tiled != tiled:
            self._begin(shape)
        if shape not in self._open:
            self._open[shape] = self._new(shape, frames.nbytes, tiled=tiled)
        batch = self._open[shape]
        np.copyto(batch.frames[len(batch.items)], frames)
        batch.items.append(item)
        self._taken += frames.nbytes
        if len(batch.items) == len(batch.frames):
            self._begin(shape)
        while self._open:
            shape, oldest = next(iter(self._open.items()))
            waiting = sum(len(batch.items) for batch in self._open.values())
            held = self._taken - oldest.opened
            if waiting <= len(oldest.frames) and held <= max(HELD_BYTES, oldest.frames.nbytes):
                return
            self._begin(shape)

    def finish(self) -> None:
        """Encode what is left, and wait for all of it."""
        while self._open:
            self._begin(next(iter(self._open)))
        self._settle()

    def _new(self, shape: Shape, clip_bytes: int, *, tiled: bool) -> _Batch[Item]:
        size = self._encoders.clips_at_once(shape)
        while self._open and self._room() + size * clip_bytes > HELD_BYTES:
            self._begin(next(iter(self._open)))
        with starving("latents", count=size, shape=shape, tiled=tiled):
            return _Batch(self._encoder.buffer(size, shape), tiled, self._taken)

    def _room(self) -> int:
        return sum(batch.frames.nbytes for batch in self._open.values())

    def _begin(self, shape: Shape) -> None:
        batch = self._open.pop(shape)
        self._begun.append(self._encoders.thread.submit(self._encode, batch, shape))
        self._settle(but=1)  # the encoder has two buffers of a shape

    def _encode(self, batch: _Batch[Item], shape: Shape) -> Spent:
        count, begun = len(batch.items), time.perf_counter()
        if self._failed:
            return Spent(0.0, 0.0, 0)  # nobody looks: the error comes out first
        try:
            with starving("latents", count=count, shape=shape, tiled=batch.tiled):
                moments = self._encoder.begin(batch.frames[:count], tiled=batch.tiled)()
            ended = time.perf_counter()
            self._done(batch.items, moments)
        except BaseException:
            self._failed = True
            raise
        # While the moments are handed over the encoder waits for the writer, not for clips.
        waited, self._idle_since = begun - self._idle_since, time.perf_counter()
        return Spent(waited, ended - begun, count)

    def _settle(self, *, but: int = 0) -> None:
        """Wait until the encoder is through with all `but` so many batches."""
        while len(self._begun) > but:
            self._encoded(self._begun.popleft().result())
