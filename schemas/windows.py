"""How much of a clip a window of so many seconds holds: as trained on, and as `inspect --drift` measures it.

In: the clips' times and rates, as the index has them, and the encoder's frame rule. Out: pixel frames of each
clip's window, counts that the encoder would take as a clip of its own, and the time they span. The trade-off:
a clip of an encoder that works in pieces has a window of at least one, however short the window.
"""

from __future__ import annotations

import numpy as np

from schemas.bucket import Geometry
from schemas.config import FramesConfig

_EVEN = ("uniform", "fps")
"""Policies whose frames stand at even times, whatever picture is on screen then."""


def elapsed(
    pts_s: np.ndarray, offsets: np.ndarray, *, fps: np.ndarray, frames: FramesConfig | None
) -> np.ndarray:
    """float64, one for each of `pts_s`: seconds from the own time of its clip's first frame to its own.

    Clip i shows pictures of the times pts_s[offsets[i]:offsets[i + 1]], in source seconds, at fps[i] frames a
    source second. A frame's own time is:

    - under `uniform` and `fps`, and in imported latents (`frames` is None), its position / fps. The picture
      it shows may have come on screen long before, in slow sources and those with gaps;
    - under the other policies, whose frames are pictures taken for themselves, the picture's. A picture that
      is repeated to fill up counts on from there, a frame each at fps.
    """
    first, counts = offsets[:-1], np.diff(offsets)
    index = np.arange(len(pts_s))
    if _is_even(frames):
        return (index - np.repeat(first, counts)) / np.repeat(fps, counts)
    comes = np.append(True, pts_s[1:] != pts_s[:-1])
    comes[first] = True
    since = np.maximum.accumulate(np.where(comes, index, 0))
    shown = pts_s[since] - np.repeat(pts_s[first], counts)
    return shown + (index - since) / np.repeat(fps, counts)


def durations(
    pts_s: np.ndarray, offsets: np.ndarray, *, fps: np.ndarray, frames: FramesConfig | None
) -> np.ndarray:
    """float64 [n]: source seconds from each clip's first frame to its last; arguments as of `elapsed`."""
    if _is_even(frames):
        return (np.diff(offsets) - 1) / fps
    return elapsed(pts_s, offsets, fps=fps, frames=frames)[offsets[1:] - 1]


def prefix_frames(
    pts_s: np.ndarray,
    offsets: np.ndarray,
    *,
    fps: np.ndarray,
    max_s: float,
    frames: FramesConfig | None,
    geometry: Geometry,
) -> np.ndarray:
    """int64 [n]: pixel frames of the window `prefix` for n clips; arguments as of `elapsed`.

    A frame is in the window if its own time lies within max_s of the first one's, give or take half a frame
    (49 frames at 16 fps are a 3 s window although times are rounded). The window is cut down to the most
    frames that the encoder takes, whole pieces where it works in pieces, and holds at least the fewest.
    """
    first, counts = offsets[:-1], np.diff(offsets)
    within = max_s + 0.5 / fps
    if _is_even(frames):
        inside = np.floor(within * fps).astype(np.int64) + 1
    else:
        index = np.arange(len(pts_s))
        outside = elapsed(pts_s, offsets, fps=fps, frames=frames) > np.repeat(within, counts)
        inside = np.minimum.reduceat(np.where(outside, index, len(index)), first) - first
    step, rest = geometry.frame_step, geometry.frame_rest
    taken = (np.minimum(inside, counts) - rest) // step * step + rest
    return np.maximum(taken, geometry.frame_least)


def latents_of(num_frames: np.ndarray, geometry: Geometry) -> np.ndarray:
    """int64 [n]: latent frames of clips of `num_frames`; 0 where the encoder does not take so many."""
    counts, of_clip = np.unique(num_frames, return_inverse=True)
    latents = [geometry.latent_frames(count) if geometry.takes(count) else 0 for count in counts.tolist()]
    return np.array(latents, np.int64)[of_clip]


def first_pixel_frame(latent_frame: int, geometry: Geometry) -> int:
    """The first of the pixel frames that a latent frame of a clip stands for; that of the frame after the
    last is the number of pixel frames."""
    piece = geometry.segment_frames
    whole, within = divmod(latent_frame, geometry.latent_frames(piece)) if piece else (0, latent_frame)
    return whole * piece + max(0, within * geometry.temporal - geometry.causal * (geometry.temporal - 1))


def _is_even(frames: FramesConfig | None) -> bool:
    return frames is None or frames.policy in _EVEN
