"""A batch: the clean clips of one pack in; what the model is given, and what it is held against, out.

Built whole on the host, so that a thread can do it while the device works, and then moved at once. Noise and
timesteps come from the clips' keys: they are the same on any rank and in any pack.

B clips, T latent frames of one (filled up to whole patches), V video tokens, P elements of a token's patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from trainer.collate import PackedInputs, collate, patchify
from trainer.layout import Layout, fill_patches
from trainer.objective import Objective
from trainer.packing import Pack


@dataclass(frozen=True, eq=False)
class Batch:
    """One pack, noised."""

    inputs: PackedInputs
    target: torch.Tensor
    """[V, P] float32, what is to be predicted."""
    lengths: tuple[int, ...]
    """Video tokens of each clip."""
    patch: tuple[int, int, int]
    """C, latent frames and cells of a patch; their product is P."""
    frame_weights: tuple[torch.Tensor, ...]
    """[T] float32 of each clip."""
    token_weights: torch.Tensor
    """[V, patch_t] float32, the same by token."""
    weight_sums: torch.Tensor
    """[B] float32, sum of each clip's `token_weights`."""
    clip_weights: torch.Tensor
    """[B] float32; 0 for what could not be read."""

    def to(self, device: torch.device) -> Batch:
        """With what a prediction is held against on `device`; the inputs go there with `sharding.predict`."""
        if device == self.target.device:
            return self
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in pinned host memory, from where it moves while the device works."""
        return replace(self._each(torch.Tensor.pin_memory), inputs=self.inputs.pinned())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(
            self,
            target=change(self.target),
            frame_weights=tuple(map(change, self.frame_weights)),
            token_weights=change(self.token_weights),
            weight_sums=change(self.weight_sums),
            clip_weights=change(self.clip_weights),
        )


def prepare(
    pack: Pack,
    *,
    objective: Objective,
    layout: Layout,
    timestep: float | None = None,
    noises: Sequence[torch.Tensor] | None = None,
) -> Batch:
    """Noise a pack's clips, each at its own timestep, or all at `timestep`; `noises` [T, C, H, W] of each are
    those of its key, where they have been drawn already."""
    noisy, targets, timesteps, weights, by_token = [], [], [], [], []
    patch, patch_t = layout.patch, layout.patch_t
    drawn: Sequence[torch.Tensor | None] = noises or [None] * len(pack.segments)
    for segment, noise in zip(pack.segments, drawn, strict=True):
        clean = fill_patches(segment.latents, patch_t=patch_t)
        at = objective.draw_timestep(segment.key) if timestep is None else timestep
        clip, target = objective.noised(clean, key=segment.key, timestep=at, noise=noise)
        noisy.append(clip)
        targets.append(patchify(target, patch=patch, patch_t=patch_t))
        timesteps.append(at)
        own = torch.ones(len(segment.latents)) if segment.frame_weights is None else segment.frame_weights
        # What fills a patch up repeats the first frame, and weighs what that does.
        own = torch.cat([own[:1].expand(len(clean) - len(own)), own])
        weights.append(own)
        rows = own.view(-1, patch_t)
        by_token.append(rows.repeat_interleave(len(targets[-1]) // len(rows), dim=0))
    prompts = [segment.prompt_embeds for segment in pack.segments]
    images = [segment.image_latents for segment in pack.segments] if layout.image else None
    target = torch.cat(targets)
    return Batch(
        inputs=collate(noisy, prompts, timesteps, layout=layout, images=images),
        target=target,
        lengths=tuple(len(part) for part in targets),
        patch=(target.shape[1] // (patch_t * patch * patch), patch_t, patch * patch),
        frame_weights=tuple(weights),
        token_weights=torch.cat(by_token),
        weight_sums=torch.stack([part.sum() for part in by_token]),
        clip_weights=torch.tensor([segment.weight for segment in pack.segments]),
    )
