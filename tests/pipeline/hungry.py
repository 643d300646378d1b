"""Stand-in encoders whose appetite for memory is a number, and that keep a diary of what they were given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.text_encoding import TextEncoding
from pipeline.tiny_t5 import TinyT5
from pipeline.video_encode import DctEncoder, Moments
from schemas.config import VideoEncoderConfig

TILES = {"tile_sample_min_height": 16}


class HungryVideo(DctEncoder):
    """Takes 8 clips at once; one clip of a shape costs its pixels, a quarter of that in tiles."""

    def __init__(self, room: float, *, batch: int = 8, late: bool = False) -> None:
        """`room` in pixels; `late`: what is too much is said by the function that waits."""
        super().__init__(VideoEncoderConfig())
        self.room, self.batch, self.late = room, batch, late
        self.begun: list[tuple[int, tuple[int, ...], bool]] = []
        """(clips, shape, tiled) of every call, those that failed among them."""
        self.loaded = 0

    def load(self) -> None:
        self.loaded += 1

    def tiling_fields(self) -> dict[str, Any]:
        return TILES

    def batch_size(self, shape: tuple[int, int, int]) -> int:
        return self.batch

    def begin(self, frames: np.ndarray, *, tiled: bool = False) -> Callable[[], Moments]:
        self.begun.append((len(frames), frames.shape[1:4], tiled))
        starved = frames.size / 3 * (0.25 if tiled else 1.0) > self.room
        if starved and not self.late:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore words")

        def wait() -> Moments:
            if starved:
                raise RuntimeError("CUDA error: out of memory")
            return DctEncoder.encode(self, frames)

        return wait

    def encode(self, frames: np.ndarray, *, tiled: bool = False) -> Moments:
        return self.begin(frames, tiled=tiled)()


class HungryText(TinyT5):
    """Takes 8 captions at once, and has room for `room`."""

    def __init__(self, room: int) -> None:
        super().__init__(max_length=16, padding="full")
        self.room = room
        self.begun: list[int] = []

    def batch_size(self) -> int:
        return 8

    def encode(self, captions: Sequence[str]) -> list[TextEncoding]:
        self.begun.append(len(captions))
        if len(captions) > self.room:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return super().encode(captions)


def manifest_of(folder: Path, names: Sequence[str]) -> Path:
    """A manifest of videos in `folder`, each with a caption of its own."""
    path = folder / "manifest.jsonl"
    path.write_text("".join(f'{{"video": "{name}", "caption": "clip {name}"}}\n' for name in names))
    return path
