"""How much of a clip a window of so many seconds holds: as trained on, and as `inspect --drift` measures it.

In: the clips' times and rates, as the index has them, and the encoder's frame rule. Out: pixel frames of each
clip's window, counts that the encoder would take as a clip of its own. The trade-off: a clip of an encoder
that works in pieces has a window of at least one, however short the window.
"""

from __future__ import annotations

import numpy as np

from schemas.bucket import Geometry
from schemas.config import FramesConfig

_EVEN = ("uniform", "fps")
"""Policies whose frames stand at even times, whatever picture is on screen then."""


def prefix_frames(
    pts_s: np.ndarray,
    offsets: np.ndarray,
    *,
    fps: np.ndarray,
    max_s: float,
    frames: FramesConfig | None,
    geometry: Geometry,
) -> np.ndarray:
    """int64 [n]: pixel frames of the window `prefix` for n clips.

    Clip i shows pictures of the times pts_s[offsets[i]:offsets[i + 1]], in source seconds, at fps[i] frames a
    source second. A frame is in the window if its own time lies within max_s of the first one's, give or take
    half a frame (49 frames at 16 fps are a 3 s window although times are rounded). Its own time is:

    - under `uniform` and `fps`, and in imported latents (`frames` is None), its position / fps. The picture
      it shows may have come on screen long before, in slow sources and those with gaps;
    - under the other policies, whose frames are pictures taken for themselves, the picture's. A picture that
      is repeated to fill up counts on from there, a frame each at fps.

    The window is cut down to the most frames that the encoder takes, whole pieces where it works in pieces,
    and holds at least the fewest.
    """
    first, counts = offsets[:-1], np.diff(offsets)
    within = max_s + 0.5 / fps
    if frames is None or frames.policy in _EVEN:
        inside = np.floor(within * fps).astype(np.int64) + 1
    else:
        index = np.arange(len(pts_s))
        comes = np.append(True, pts_s[1:] != pts_s[:-1])
        comes[first] = True
        since = np.maximum.accumulate(np.where(comes, index, 0))
        elapsed = pts_s[since] - np.repeat(pts_s[first], counts) + (index - since) / np.repeat(fps, counts)
        outside = elapsed > np.repeat(within, counts)
        inside = np.minimum.reduceat(np.where(outside, index, len(index)), first) - first
    step, rest = geometry.frame_step, geometry.frame_rest
    taken = (np.minimum(inside, counts) - rest) // step * step + rest
    return np.maximum(taken, geometry.frame_least)
