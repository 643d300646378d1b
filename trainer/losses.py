"""Losses: a prediction and its batch in; each clip's error and the pack's share of the step's loss out.

Every latent frame has a weight w (1, or the keyframe weights below). The error of a clip is
sum(w e) / sum(w) over its latent frames, e the mean squared error of one, plus alpha times the error of the
differences between neighbouring frames, weighed by the mean of their two. Both stay inside a clip. What a
clip counts for in its step is divided by sizes of the whole step, which the plan knows: then neither packing
nor the number of ranks changes a gradient.

B clips, T latent frames of one (filled up to whole patches), V video tokens, P = C * patch_t * patch * patch
elements of a token's patch, in this order.
"""

from __future__ import annotations

import numpy as np
import torch

from schemas.bucket import Geometry
from schemas.train_config import LossConfig
from trainer.batch import Batch
from trainer.packing import StepWeights


def latent_frame_weights(
    activity: np.ndarray, offsets: np.ndarray, *, geometry: Geometry, keyframe_lambda: float
) -> np.ndarray:
    """float32, one weight per latent frame, clip after clip; between 1 and `keyframe_lambda`.

    Clip i has the pixel frames activity[offsets[i]:offsets[i + 1]], the index's `frame_weights`, whose mean
    over a clip is 1. A latent frame of the mean activity a of its pixel frames weighs
    1 + (keyframe_lambda - 1) * clamp(a - 1, 0, 1): what is as active as usual, or less, weighs 1.
    """
    counts = np.diff(offsets)
    position = np.arange(offsets[0], offsets[-1]) - np.repeat(offsets[:-1], counts)
    if geometry.segment_frames:
        position %= geometry.segment_frames
    first = (position == 0) | ((position - geometry.causal) % geometry.temporal == 0)
    starts = np.flatnonzero(first)
    sums = np.add.reduceat(activity[offsets[0] : offsets[-1]].astype(np.float64), starts)
    mean = sums / np.diff(np.append(starts, len(first)))
    weights: np.ndarray = 1 + (keyframe_lambda - 1) * np.clip(mean - 1, 0, 1)
    return weights.astype(np.float32)


def clip_losses(prediction: torch.Tensor, batch: Batch, *, consistency_alpha: float = 0.0) -> torch.Tensor:
    """[B] float32, the error of each clip; `prediction` is [V, P] in any float type."""
    error = prediction.float() - batch.target
    by_frame = error.square().unflatten(1, batch.patch).mean(dim=(1, 3))  # [V, patch_t]
    weighed = (by_frame * batch.token_weights).sum(dim=1)
    sums = torch.stack([clip.sum() for clip in weighed.split(batch.lengths)])
    losses = sums / batch.weight_sums
    if consistency_alpha:
        clips = zip(error.split(batch.lengths), batch.frame_weights, strict=True)
        changes = [_change(clip, weights, patch=batch.patch) for clip, weights in clips]
        losses = losses + consistency_alpha * torch.stack(changes)
    return losses


def _change(error: torch.Tensor, weights: torch.Tensor, *, patch: tuple[int, int, int]) -> torch.Tensor:
    """Mean squared difference of the errors [V of a clip, P] of neighbouring latent frames; 0 for one frame.

    The difference of two errors is that of the predicted difference from the target's.
    """
    if len(weights) == 1:
        return error.new_zeros(())
    tokens = len(error) * patch[1] // len(weights)  # of one row of patches
    by_patch = error.unflatten(1, patch).unflatten(
        0, (-1, tokens)
    )  # [T / patch_t, tokens, C, patch_t, cells]
    frames = by_patch.movedim(3, 1).flatten(0, 1)  # [T, tokens, C, cells]
    pairs = (weights[1:] + weights[:-1]) / 2
    return (frames.diff(dim=0).square().mean(dim=(1, 2, 3)) * pairs).sum() / pairs.sum()


def batch_loss(
    prediction: torch.Tensor, batch: Batch, *, loss: LossConfig, step: StepWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the pack's share of the step's loss, the error [B] of each clip, without gradient).

    The shares of all packs of a step sum to its loss: the mean over its clips (`per_clip`), or over its
    weighed video tokens (`per_token`). A clip of weight 0 could not be read; it adds nothing.
    """
    losses = clip_losses(prediction, batch, consistency_alpha=loss.consistency_alpha)
    if loss.normalize == "per_clip":
        share = batch.clip_weights / step.num_clips
    else:
        share = batch.clip_weights * batch.weight_sums / batch.patch[1] / step.num_video_tokens
    return (losses * share).sum(), losses.detach()
