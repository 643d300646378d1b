"""Collation: noisy clips of any shapes and their prompts in, one flat token stream for the model out.

Each segment is its prompt, then its video; nothing is padded. Index tables are built here, on the
host, once per pack, so that the forward pass only gathers and never asks the device for a size.

T, C, H, W latents of one clip; V video tokens, X prompt tokens, L = V + X; B segments; P = channels of
a patch; D prompt width, D_h width of a head, E width of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from trainer.attention import segment_lengths
from trainer.positions import Grid, rotary_table, sincos_table


@dataclass(frozen=True, eq=False)
class PackedInputs:
    """Everything the transformer needs of one pack; ValueError where the parts disagree."""

    video: torch.Tensor
    """[V, P] float32 patches, segment after segment."""
    text: torch.Tensor
    """[X, D] float32 prompt embeddings, segment after segment."""
    timesteps: torch.Tensor
    """[B] int64."""
    order: torch.Tensor
    """[L] int64: the row of cat([video, text]) at each place of the stream."""
    video_places: torch.Tensor
    """[V] int64: the place of each video token in the stream."""
    modulation_row: torch.Tensor
    """[L] int64: segment for video, B + segment for text."""
    cu_seqlens: torch.Tensor
    """[B + 1] int32: where segments start and end in the stream."""
    max_seqlen: int
    """Longest segment; a host number, so that no kernel launch waits for the device."""
    video_lengths: tuple[int, ...]
    """Video tokens of each segment."""
    cos: torch.Tensor | None
    """[L, D_h] rotary table, 1 on text; None for absolute positions."""
    sin: torch.Tensor | None
    """[L, D_h], 0 on text."""
    positions: torch.Tensor | None
    """[V, E] added to the embedded patches; None for rotary positions."""

    def __post_init__(self) -> None:
        tokens, segments = len(self.order), len(self.timesteps)
        lengths = segment_lengths(self.cu_seqlens.tolist(), num_tokens=tokens)
        checks = {
            "video + text": (len(self.video) + len(self.text), tokens),
            "modulation_row": (len(self.modulation_row), tokens),
            "video_places": (len(self.video_places), len(self.video)),
            "sum of video_lengths": (sum(self.video_lengths), len(self.video)),
            "segments": (len(lengths), segments),
            "max_seqlen": (self.max_seqlen, max(lengths)),
            "cos": (tokens if self.cos is None else len(self.cos), tokens),
            "positions": (
                len(self.video) if self.positions is None else len(self.positions),
                len(self.video),
            ),
        }
        wrong = [
            f"{name}: expected {want}, found {found}"
            for name, (found, want) in checks.items()
            if found != want
        ]
        if wrong:
            raise ValueError("a pack's parts disagree; " + "; ".join(wrong))

    def to(self, device: torch.device) -> PackedInputs:
        """The same pack with its tensors on `device`."""
        if device == self.video.device:
            return self
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if torch.is_tensor(value):
                values[name] = value.to(device, non_blocking=True)
        return PackedInputs(**values)


def collate(
    latents: Sequence[torch.Tensor], prompts: Sequence[torch.Tensor], timesteps: Sequence[int], *, config: Any
) -> PackedInputs:
    """Noisy `latents` [T, C, H, W], `prompts` [S, D] and one timestep per clip, for a diffusers `config`."""
    count = len(latents)
    if not count == len(prompts) == len(timesteps):
        raise ValueError(
            f"expected as many of each, found {count} latents, {len(prompts)} prompts, "
            f"{len(timesteps)} timesteps"
        )
    patch, patch_t = config.patch_size, config.patch_size_t or 1
    grids = [(t // patch_t, h // patch, w // patch) for t, _, h, w in (x.shape for x in latents)]
    video_lengths = [t * h * w for t, h, w in grids]
    text_lengths = [len(prompt) for prompt in prompts]
    bounds = [0, *itertools.accumulate(a + b for a, b in zip(text_lengths, video_lengths, strict=True))]
    rows = torch.arange(bounds[-1])
    video_rows = torch.split(rows[: sum(video_lengths)], video_lengths)
    text_rows = torch.split(rows[sum(video_lengths) :], text_lengths)
    order = torch.cat([part for pair in zip(text_rows, video_rows, strict=True) for part in pair])
    is_text = order >= sum(video_lengths)
    segment = torch.repeat_interleave(torch.arange(count), torch.tensor(bounds).diff())
    cos, sin, positions = _positions(grids, text_lengths, config)
    return PackedInputs(
        video=torch.cat([patchify(clip, patch=patch, patch_t=patch_t) for clip in latents]),
        text=torch.cat(list(prompts)),
        timesteps=torch.tensor(timesteps),
        order=order,
        video_places=rows[~is_text],
        modulation_row=segment + count * is_text,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(end - start for start, end in itertools.pairwise(bounds)),
        video_lengths=tuple(video_lengths),
        cos=cos,
        sin=sin,
        positions=positions,
    )


def patchify(latents: torch.Tensor, *, patch: int, patch_t: int) -> torch.Tensor:
    """[T, C, H, W] -> [V, C * patch_t * patch * patch], the order of the patch embedding's weights.

    The model's output has the same order, so a loss needs no unpatchify.
    """
    frames, channels, height, width = latents.shape
    if frames % patch_t or height % patch or width % patch:
        raise ValueError(
            f"expected multiples of the patch {(patch_t, patch, patch)}, found {tuple(latents.shape)}"
        )
    cut = latents.reshape(frames // patch_t, patch_t, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 3, 5, 2, 1, 4, 6).flatten(3).flatten(0, 2)


def fill_patches(latents: torch.Tensor, *, patch_t: int | None) -> torch.Tensor:
    """`latents` with the first frame repeated in front until T is a multiple of `patch_t`.

    CogVideoX 1.5 is trained so (THUDM/CogVideo finetune/, compute_loss), and its pipeline drops the
    same number of leading frames from what it samples.
    """
    missing = -len(latents) % (patch_t or 1)
    return torch.cat([latents[:1].expand(missing, -1, -1, -1), latents]) if missing else latents


def _positions(
    grids: Sequence[Grid], text_lengths: Sequence[int], config: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(cos, sin, None) for rotary models, (None, None, positions) for absolute ones."""
    if not config.use_rotary_positional_embeddings:
        tables = [
            sincos_table(
                grid,
                width=config.num_attention_heads * config.attention_head_dim,
                spatial_scale=config.spatial_interpolation_scale,
                temporal_scale=config.temporal_interpolation_scale,
            )
            for grid in grids
        ]
        return None, None, torch.cat(tables)
    base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
    width = config.attention_head_dim
    cos, sin = [], []
    for grid, length in zip(grids, text_lengths, strict=True):
        clip_cos, clip_sin = rotary_table(grid, head_dim=width, base=None if config.patch_size_t else base)
        cos += [torch.ones(length, width), clip_cos]  # text is not rotated
        sin += [torch.zeros(length, width), clip_sin]
    return torch.cat(cos), torch.cat(sin), None
