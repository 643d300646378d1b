"""The layout of a token stream: what collation must know of a model, and how clips are cut into spans.

A clip is cut into *spans*, within which its tokens attend to each other; without `local_frames` it is one.
The first latent frame of a causal encoder counts to the first span, so a clip of 1 + n * local_frames latent
frames has n, as many as TTT-Video (https://arxiv.org/abs/2504.05298) has segments of 3 s. The trade-off: a
clip of another length ends with a shorter span instead of being refused.

T latent frames of a clip; patches in time are counted after `fill_patches`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch

from schemas.errors import ConfigError

Grid = tuple[int, int, int]
"""Patches of a clip in time, height and width."""
Counts = TypeVar("Counts", int, np.ndarray)


@dataclass(frozen=True)
class Layout:
    """The stream that a model takes, and the patches it gives back."""

    patch: int
    """Latent pixels per token, in height and width."""
    patch_t: int
    """Latent frames per token."""
    in_channels: int
    """Of a latent frame as the model takes it: the noisy latents', and with `image` as many again."""
    out_channels: int
    """Of a latent frame as the model predicts it."""
    head_dim: int
    width: int
    """Of a token inside the model."""
    positions: Literal["squeezed", "counted", "sincos"]
    """Rotary positions squeezed into the base grid (CogVideoX 1.0) or counted in patches (1.5); or sines and
    cosines added to embedded patches (2B)."""
    base: Grid
    """Patches of the clips that the model's config describes."""
    max_text: int
    """Most prompt tokens."""
    spatial_scale: float = 1.0
    """Of `sincos` positions: patches per step in height and width."""
    temporal_scale: float = 1.0
    """The same in time."""
    learned: bool = False
    """A learned position is added to each token too; the model then knows clips of the base grid only."""
    image: bool = False
    """The clip's first frame is given beside the noisy latents, as further channels."""
    text: Literal["joint", "cross"] = "joint"
    """Prompt tokens are part of the stream, or kept out of it."""
    local_frames: int = 0
    """Latent frames of a span; 0: a clip is one."""
    long_context: bool = False
    """The model has layers that take a clip's tokens over all of its spans."""
    leading_frames: int = 1
    """Latent frames that the first span has more: 1 where the encoder gives the first frame its own."""


def fill_patches(latents: torch.Tensor, *, patch_t: int) -> torch.Tensor:
    """`latents` [T, C, H, W] with the first frame repeated in front until T is a multiple of `patch_t`.

    CogVideoX 1.5 is trained so (THUDM/CogVideo finetune/, compute_loss), and its pipeline drops the
    same number of leading frames from what it samples.
    """
    missing = -len(latents) % patch_t
    return torch.cat([latents[:1].expand(missing, -1, -1, -1), latents]) if missing else latents


def check_clips(shapes: Iterable[tuple[int, int, int]], layout: Layout) -> None:
    """ConfigError where a model with learned positions does not know clips of T, H, W latents.

    Diffusers puts sines, which the weights never saw, in place of those for another number of frames.
    """
    if not layout.learned:
        return
    known = (layout.base[0] * layout.patch_t, *(side * layout.patch for side in layout.base[1:]))
    for shape in shapes:
        if (-(-shape[0] // layout.patch_t) * layout.patch_t, *shape[1:]) != known:
            raise ConfigError(
                f"this model has learned positions, for clips of {' x '.join(map(str, known))} latents "
                f"(frames, height, width), found {' x '.join(map(str, shape))}; set the stage's "
                "filter.buckets and max_frames to what it knows"
            )


def num_spans(frames: Counts, *, local_frames: int, leading_frames: int = 1, patch_t: int = 1) -> Counts:
    """Spans of a clip of T = `frames` latent frames, a number or an array of them.

    ValueError where `local_frames` is no multiple of `patch_t`.
    """
    if not local_frames:
        return frames * 0 + 1
    if local_frames % patch_t:
        raise ValueError(f"expected a multiple of {patch_t = }, found {local_frames = }")
    patches = -(-frames // patch_t) - leading_frames
    spans = -(-patches * patch_t // local_frames)
    return np.maximum(spans, 1) if isinstance(spans, np.ndarray) else max(spans, 1)


def span_patches(patches: int, layout: Layout) -> list[int]:
    """Patches in time of each span of a clip that has `patches` of them."""
    count = num_spans(
        patches * layout.patch_t,
        local_frames=layout.local_frames,
        leading_frames=layout.leading_frames,
        patch_t=layout.patch_t,
    )
    if count == 1:
        return [patches]
    local = layout.local_frames // layout.patch_t
    first = layout.leading_frames + local
    return [first, *[local] * (count - 2), patches - first - local * (count - 2)]
