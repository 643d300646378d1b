"""One visit of a sample: what the plan decided, and all that the reader must know to make a segment of it.

Every field is a pure function of seed, stage, epoch and sample, so that any rank can tell any visit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Visit:
    """A window of one sample with a caption, in one epoch."""

    row: int
    """Of the sample's own catalog."""
    first: int
    """First latent frame of the window."""
    latent_frames: int
    """Latent frames of the window, from `first` on."""
    key: str
    """Names the visit; seeds its posterior draw, noise and timestep."""
    empty_prompt: bool = False
    """The caption is dropped: the dataset's empty prompt stands for it."""
    drop_image: bool = False
    """The image condition is zeros."""
    seconds: float = 0.0
    """Source seconds from the window's first frame to its last."""
    frame_weights: tuple[float, ...] | None = None
    """Weight of each latent frame's error, [latent_frames]; None: all 1."""
