"""A video encoder that takes a clip in pieces: each of `segment_frames` frames, encoded as a clip of its own.

In: any encoder. Out: the same encoder with another frame rule (F = segment_frames * n). Whole pieces of a
clip are then, number for number, what encoding them alone gives, so any window of them can be cut out of
cached latents. The price: an encoder that looks back in time forgets at every border, and latents
of a long clip are not those that its model was trained on.

B clips, F pixel frames, N pieces of a clip, T latent frames, C channels, H, W pixels or latent cells.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from schemas.errors import ConfigError
from schemas.scaling import ImageLatents

if TYPE_CHECKING:
    from pipeline.video_encode import Moments, VideoEncoder


class Segmented:
    """`encoder`, a piece of `segment_frames` at a time; ConfigError where it cannot take such a piece."""

    def __init__(self, encoder: VideoEncoder, segment_frames: int) -> None:
        inner = encoder.geometry
        if not inner.takes(segment_frames):
            below = next(filter(inner.takes, range(segment_frames, 0, -1)), None)
            above = next(filter(inner.takes, itertools.count(segment_frames)))
            raise ConfigError(
                f"video_encoder.segment_frames = {segment_frames}: the video encoder takes {inner.rule} "
                + (f"frames; nearest are {below} and {above}" if below else f"frames; nearest is {above}")
            )
        self._encoder, self._frames = encoder, segment_frames
        self.name, self.scaling, self.image_scaling = encoder.name, encoder.scaling, encoder.image_scaling
        self.geometry = dataclasses.replace(inner, segment_frames=segment_frames)

    @property
    def image(self) -> ImageLatents:
        return self._encoder.image

    def hard_fields(self) -> dict[str, Any]:
        return {**self._encoder.hard_fields(), "segment_frames": self._frames}

    def tiling_fields(self) -> dict[str, Any]:
        return self._encoder.tiling_fields()

    def load(self) -> None:
        self._encoder.load()

    def batch_size(self, shape: tuple[int, int, int]) -> int:
        """As many clips as the encoder takes pieces: there are never more pieces under way than clips in a
        batch, so that halving the batch halves the memory, down to one piece."""
        return self._encoder.batch_size((self._frames, *shape[1:]))

    def buffer(self, num_clips: int, shape: tuple[int, int, int]) -> np.ndarray:
        pieces = num_clips * shape[0] // self._frames
        return self._encoder.buffer(pieces, (self._frames, *shape[1:])).reshape(num_clips, *shape, 3)

    def begin(self, frames: np.ndarray, *, tiled: bool = False) -> Callable[[], Moments]:
        self.geometry.latent_frames(frames.shape[1])
        num_clips = len(frames)
        pieces = frames.reshape(-1, self._frames, *frames.shape[2:])
        first = self._encoder.begin(pieces[:num_clips], tiled=tiled)

        def finish() -> Moments:
            parts, under_way = [], first
            for i in range(num_clips, len(pieces), num_clips):
                # Begun before the wait, so that a GPU always has the next pieces.
                following = self._encoder.begin(pieces[i : i + num_clips], tiled=tiled)
                parts.append(under_way())
                under_way = following
            return _joined([*parts, under_way()], num_clips)

        return finish

    def encode(self, frames: np.ndarray, *, tiled: bool = False) -> Moments:
        return self.begin(frames, tiled=tiled)()

    def decode(self, latents: np.ndarray, *, tiled: bool = False) -> np.ndarray:
        size = self._encoder.geometry.latent_frames(self._frames)
        if len(latents) % size:
            raise ValueError(f"expected pieces of {size} latent frames, found {latents.shape = }")
        starts = range(0, len(latents), size)
        return np.concatenate([self._encoder.decode(latents[i : i + size], tiled=tiled) for i in starts])


def _joined(parts: list[Moments], num_clips: int) -> Moments:
    """Moments of pieces [B * N, T, C, H, W] -> of clips [B, N * T, C, H, W]; of what belongs to a first frame
    (`image_...`), that of the first piece."""
    import torch

    moments = {}
    for name in parts[0]:
        pieces = torch.cat([part[name] for part in parts]).unflatten(0, (num_clips, -1))
        moments[name] = pieces[:, 0] if name.startswith("image_") else pieces.flatten(1, 2)
    return moments
