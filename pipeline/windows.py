"""What a window cut out of a long clip's latents is worth: held against encoding the window alone.

In: an encoder and the frames of one clip. Out: for every window of the curriculum that is shorter than the
clip, how far its cached latents lie from those it would have as a clip of its own: from the start
(`prefix`) and from the middle (`interior`). Latents are compared scaled, about unit variance over many
clips: 0 is the same numbers, a root mean square of 1 as far apart as two unrelated clips. The price:
every window is encoded twice, so one clip takes up to three times what preprocessing it took.

F pixel frames, T latent frames, C channels, H, W pixels (frames) or latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.video_encode import VideoEncoder
from schemas.bucket import Geometry
from schemas.scaling import scale

SECONDS = (3.0, 9.0, 18.0, 30.0, 63.0)
"""The curriculum: TTT-Video's windows (3, 9, 18, 30 and 63 s at 16 frames per second)."""
PLACES = (1, 6, 12)
"""Latent frames of an interior window that are told, counted from 1."""


@dataclass(frozen=True)
class Drift:
    """One window length of one clip."""

    seconds: float
    num_frames: int
    latent_frames: int
    prefix: float
    """Largest absolute difference of the window at the clip's start; 0: exact."""
    first: int
    """Latent frame of the clip that the interior window begins with."""
    interior: tuple[float, ...]
    """Root mean square difference of each latent frame of the interior window."""

    @property
    def places(self) -> dict[int, float]:
        """`interior` at PLACES, as far as the window goes."""
        return {place: self.interior[place - 1] for place in PLACES if place <= self.latent_frames}


def drifts(encoder: VideoEncoder, frames: np.ndarray, *, fps: float, tiled: bool = False) -> Iterator[Drift]:
    """The windows of SECONDS that are shorter than a clip, uint8 [F, H, W, 3] at `fps`, shortest first.

    An interior window lies near the middle, where there is room an even number of latent frames from the
    start: encoders that take several at once (CogVideoX: two) group them there as at a start. Where the
    encoder works in pieces, it is of whole ones.
    """
    geometry = encoder.geometry
    whole = _encoded(encoder, frames, tiled)

    def scaled(window: np.ndarray) -> np.ndarray:  # as the trainer reads it: a rule may count latent frames
        result: np.ndarray = scale(window, encoder.scaling)
        return result

    piece = geometry.latent_frames(geometry.segment_frames) if geometry.segment_frames else 1
    for seconds in SECONDS:
        num_frames = frames_of(seconds, fps=fps, geometry=geometry)
        if not num_frames or num_frames >= len(frames):
            continue
        prefix = _encoded(encoder, frames[:num_frames], tiled)
        size = len(prefix)
        room = (len(whole) - size) // piece
        steps = max(1, room // 2) if geometry.segment_frames or room < 4 else room // 4 * 2
        start = steps * (geometry.segment_frames or geometry.temporal)
        alone = _encoded(encoder, frames[start : start + num_frames], tiled)
        error = scaled(whole[steps * piece : steps * piece + size]) - scaled(alone)
        yield Drift(
            seconds=seconds,
            num_frames=num_frames,
            latent_frames=size,
            prefix=float(np.abs(scaled(whole[:size]) - scaled(prefix)).max()),
            first=steps * piece,
            interior=tuple(float(x) for x in np.sqrt(np.mean(error**2, axis=(1, 2, 3)))),
        )


def frames_of(seconds: float, *, fps: float, geometry: Geometry) -> int:
    """The most frames from 0 to `seconds` that the encoder takes, 0 where it takes none: 49 for 3 s at 16."""
    return next(filter(geometry.takes, range(round(seconds * fps) + 1, 0, -1)), 0)


def _encoded(encoder: VideoEncoder, frames: np.ndarray, tiled: bool) -> np.ndarray:
    """Unscaled means, float32 [T, C, H, W]."""
    latents: np.ndarray = encoder.encode(frames[None], tiled=tiled)["mean"][0].numpy()
    return latents
