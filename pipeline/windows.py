"""What a window cut out of a long clip's latents is worth: held against encoding the window alone.

In: an encoder, the frames of one clip and the lengths of windows (`schemas.windows`). Out: for every window
that is shorter than the clip, how far its cached latents lie from those it would have as a clip of its own:
from the start (`prefix`) and from the middle (`interior`). Latents are compared scaled, in standard
deviations of the clip's own, each channel's mean taken off: 0 is the same numbers, and two unrelated clips
of that deviation are about 1.4 apart (root mean square). The price: every window is encoded twice, so one
clip takes up to three times what preprocessing it took.

F pixel frames, T latent frames, C channels, H, W pixels (frames) or latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.video_encode import VideoEncoder
from schemas.scaling import scale

SECONDS = (3.0, 9.0, 18.0, 30.0, 63.0)
"""The curriculum: TTT-Video's windows (3, 9, 18, 30 and 63 s at 16 frames per second)."""
PLACES = (1, 6, 12)
"""Latent frames of an interior window that are told, counted from 1."""


@dataclass(frozen=True)
class Drift:
    """One window length of one clip; differences are in standard deviations of the clip's latents."""

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


def drifts(
    encoder: VideoEncoder, frames: np.ndarray, *, windows: Mapping[float, int], tiled: bool = False
) -> Iterator[Drift]:
    """The `windows` (seconds to frames, counts that the encoder takes) that are shorter than a clip, uint8
    [F, H, W, 3].

    An interior window lies near the middle, where there is room an even number of latent frames from the
    start: encoders that take several at once (CogVideoX: two) group them there as at a start. Where the
    encoder works in pieces, it is of whole ones.
    """
    geometry = encoder.geometry
    whole = _encoded(encoder, frames, tiled)

    def scaled(window: np.ndarray) -> np.ndarray:  # as the trainer reads it: a rule may count latent frames
        result: np.ndarray = scale(window, encoder.scaling)
        return result

    # A clip all alike has none, and no differences.
    deviation = float(np.sqrt(scaled(whole).var(axis=(0, 2, 3)).mean())) or 1.0
    piece = geometry.latent_frames(geometry.segment_frames) if geometry.segment_frames else 1
    for seconds, num_frames in windows.items():
        if num_frames >= len(frames):
            continue
        prefix = _encoded(encoder, frames[:num_frames], tiled)
        size = len(prefix)
        room = (len(whole) - size) // piece
        steps = max(1, room // 2) if geometry.segment_frames or room < 4 else room // 4 * 2
        start = steps * (geometry.segment_frames or geometry.temporal)
        alone = _encoded(encoder, frames[start : start + num_frames], tiled)
        error = (scaled(whole[steps * piece : steps * piece + size]) - scaled(alone)) / deviation
        yield Drift(
            seconds=seconds,
            num_frames=num_frames,
            latent_frames=size,
            prefix=float(np.abs(scaled(whole[:size]) - scaled(prefix)).max()) / deviation,
            first=steps * piece,
            interior=tuple(float(x) for x in np.sqrt(np.mean(error**2, axis=(1, 2, 3)))),
        )


def _encoded(encoder: VideoEncoder, frames: np.ndarray, tiled: bool) -> np.ndarray:
    """Unscaled means, float32 [T, C, H, W]."""
    latents: np.ndarray = encoder.encode(frames[None], tiled=tiled)["mean"][0].numpy()
    return latents
