"""Collation: noisy clips of any shapes and their prompts in, one flat token stream for the model out.

Each span of a clip (`trainer.layout`) is a prompt, then its video; nothing is padded. Index tables are built
here, on the host, once per pack, so that the forward pass only gathers and never asks the device for a size.

T, C, H, W latents of one clip; B clips, A spans; V video tokens, X prompt tokens, L tokens of the stream:
each video token once, and each prompt once per span of its clip, or not at all where text is kept apart.
P channels of a patch; D prompt width, D_h width of a head, E width of the model.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch

from trainer.attention import remember_bounds, segment_lengths
from trainer.layout import Grid, Layout, check_clips, span_patches
from trainer.positions import clip_positions, learned_rows, span_positions


@dataclass(frozen=True, eq=False)
class PackedInputs:
    """Everything the transformer needs of one pack; ValueError where the parts disagree."""

    video: torch.Tensor
    """[V, P] float32 patches, clip after clip."""
    text: torch.Tensor
    """[X, D] float32 prompt embeddings, clip after clip, each once."""
    timesteps: torch.Tensor
    """[B] int64 or float32."""
    order: torch.Tensor
    """[L] int64: the row of cat([video, text]) at each place of the stream; a prompt's rows once per span."""
    video_places: torch.Tensor
    """[V] int64: the place of each video token in the stream."""
    modulation_row: torch.Tensor
    """[L] int64: clip for video, B + clip for text."""
    cu_seqlens: torch.Tensor
    """[A + 1] int32: where spans start and end in the stream."""
    max_seqlen: int
    """Longest span; a host number, so that no kernel launch waits for the device."""
    clip_seqlens: torch.Tensor
    """[B + 1] int32: where clips start and end in the stream."""
    max_clip: int
    """Longest clip."""
    text_seqlens: torch.Tensor
    """[B + 1] int32: where prompts start and end in `text`."""
    max_text: int
    """Longest prompt."""
    video_lengths: tuple[int, ...]
    """Video tokens of each clip."""
    cos: torch.Tensor | None
    """[L, D_h] rotary table, 1 on text; None for absolute positions."""
    sin: torch.Tensor | None
    """[L, D_h], 0 on text."""
    clip_cos: torch.Tensor | None
    """[L, D_h] as `cos`, counted on through the spans of a clip, for long-context layers; None where there
    are none, or every clip is one span."""
    clip_sin: torch.Tensor | None
    """[L, D_h]."""
    positions: torch.Tensor | None
    """[V, E] added to the embedded patches; None for rotary positions."""
    learned_row: torch.Tensor | None
    """[V + X] int64: the row of the model's learned positions for each row of cat([video, text])."""

    def __post_init__(self) -> None:
        tokens, clips, videos = len(self.order), len(self.timesteps), len(self.video)
        rows = videos + len(self.text)
        spans = segment_lengths(self.cu_seqlens.tolist(), num_tokens=tokens)
        lengths = segment_lengths(self.clip_seqlens.tolist(), num_tokens=tokens)
        prompts = segment_lengths(self.text_seqlens.tolist(), num_tokens=len(self.text))
        shared = set(self.clip_seqlens.tolist()) & set(self.cu_seqlens.tolist())
        checks = {
            "modulation_row": (len(self.modulation_row), tokens),
            "video_places": (len(self.video_places), videos),
            "sum of video_lengths": (sum(self.video_lengths), videos),
            "clips": (len(lengths), clips),
            "prompts": (len(prompts), clips),
            "bounds of clips that are bounds of spans": (len(shared), clips + 1),
            "max_seqlen": (self.max_seqlen, max(spans)),
            "max_clip": (self.max_clip, max(lengths)),
            "max_text": (self.max_text, max(prompts)),
            "cos": (tokens if self.cos is None else len(self.cos), tokens),
            "clip_cos": (tokens if self.clip_cos is None else len(self.clip_cos), tokens),
            "positions": (videos if self.positions is None else len(self.positions), videos),
            "learned_row": (rows if self.learned_row is None else len(self.learned_row), rows),
        }
        wrong = [
            f"{name}: expected {want}, found {found}"
            for name, (found, want) in checks.items()
            if found != want
        ]
        if wrong:
            raise ValueError("a pack's parts disagree; " + "; ".join(wrong))

    def to(self, device: torch.device) -> Self:
        """The same pack with its tensors on `device`."""
        if device == self.video.device:
            return self
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """The same pack in pinned host memory."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        moved = copy.copy(self)  # not built anew: the checks would wait for the device to have the bounds
        for field in fields(self):
            if torch.is_tensor(value := getattr(self, field.name)):
                object.__setattr__(moved, field.name, change(value))
        for name in ("cu_seqlens", "clip_seqlens", "text_seqlens"):
            remember_bounds(getattr(moved, name), getattr(self, name).tolist())
        return moved


def collate(
    latents: Sequence[torch.Tensor],
    prompts: Sequence[torch.Tensor],
    timesteps: Sequence[float],
    *,
    layout: Layout,
    images: Sequence[torch.Tensor | None] | None = None,
) -> PackedInputs:
    """Noisy `latents` [T, C, H, W], `prompts` [S, D] and one timestep per clip, for a model of `layout`.

    T is a multiple of `patch_t` (`fill_patches`). `images` [1, C, H, W] are the conditions of a layout with
    `image`; where there is none they are zeros, as for a visit that dropped it. Whole timesteps stay whole.
    """
    count = len(latents)
    images = [None] * count if images is None else images
    if not count == len(prompts) == len(timesteps) == len(images) or not count:
        raise ValueError(
            f"expected as many of each, and some, found {count} latents, {len(prompts)} prompts, "
            f"{len(timesteps)} timesteps, {len(images)} images"
        )
    if layout.image:
        latents = [with_image(clip, image) for clip, image in zip(latents, images, strict=True)]
    elif any(image is not None for image in images):
        raise ValueError("found image latents, and a model that takes none")
    check_clips(((t, h, w) for t, _, h, w in (clip.shape for clip in latents)), layout)
    video = [patchify(clip, patch=layout.patch, patch_t=layout.patch_t) for clip in latents]
    grids = [
        (t // layout.patch_t, h // layout.patch, w // layout.patch)
        for t, _, h, w in (clip.shape for clip in latents)
    ]
    spans = [span_patches(grid[0], layout) for grid in grids]
    stream = _stream(grids, spans, [len(prompt) for prompt in prompts], joint=layout.text == "joint")
    cos, sin, positions = span_positions(grids, spans, stream.texts, layout)
    clip_cos, clip_sin = clip_positions(grids, spans, stream.texts, layout)
    learned_row = learned_rows(grids, [len(prompt) for prompt in prompts], layout) if layout.learned else None
    return PackedInputs(
        video=torch.cat(video),
        text=torch.cat(list(prompts)),
        timesteps=torch.tensor(timesteps),
        order=stream.order,
        video_places=(stream.order < sum(map(len, video))).nonzero().flatten(),
        modulation_row=stream.modulation_row,
        cu_seqlens=_bounds(stream.spans),
        max_seqlen=max(stream.spans),
        clip_seqlens=_bounds(stream.clips),
        max_clip=max(stream.clips),
        text_seqlens=_bounds([len(prompt) for prompt in prompts]),
        max_text=max(map(len, prompts)),
        video_lengths=tuple(map(len, video)),
        cos=cos,
        sin=sin,
        clip_cos=clip_cos,
        clip_sin=clip_sin,
        positions=positions,
        learned_row=learned_row,
    )


def with_image(latents: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
    """[T, C, H, W] -> [T, 2 C, H, W]: the image latents [1, C, H, W] beside the first frame, else zeros.

    T is that of `fill_patches`: CogVideoX 1.5 has the image at the repeated frame alone (diffusers'
    CogVideoXImageToVideoPipeline and THUDM/CogVideo finetune/ agree).
    """
    beside = torch.zeros_like(latents)
    if image is not None:
        beside[:1] = image
    return torch.cat([latents, beside], dim=1)


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


@dataclass(frozen=True)
class _Stream:
    """How clips and prompts lie in the stream."""

    order: torch.Tensor
    modulation_row: torch.Tensor
    texts: list[int]
    """Prompt tokens in front of each span."""
    spans: list[int]
    """Tokens of each span."""
    clips: list[int]
    """Tokens of each clip."""


def _stream(
    grids: Sequence[Grid], spans: Sequence[Sequence[int]], text_lengths: Sequence[int], *, joint: bool
) -> _Stream:
    count, num_video = len(grids), sum(t * h * w for t, h, w in grids)
    video_row, text_row = 0, num_video
    order, modulation_row, span_texts, span_lengths, clip_lengths = [], [], [], [], []
    for clip, ((_, height, width), patches, text) in enumerate(zip(grids, spans, text_lengths, strict=True)):
        shown = text if joint else 0
        for frames in patches:
            video = frames * height * width
            order += [torch.arange(text_row, text_row + shown), torch.arange(video_row, video_row + video)]
            modulation_row += [torch.full((shown,), count + clip), torch.full((video,), clip)]
            span_texts.append(shown)
            span_lengths.append(shown + video)
            video_row += video
        clip_lengths.append(sum(span_lengths[-len(patches) :]))
        text_row += text
    return _Stream(torch.cat(order), torch.cat(modulation_row), span_texts, span_lengths, clip_lengths)


def _bounds(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
