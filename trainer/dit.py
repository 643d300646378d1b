"""A plain video diffusion transformer for training from scratch, with the interface of the packed CogVideoX.

In goes a packed stream (`trainer.collate`), out comes a patch per video token. DiT's adaLN-Zero blocks
(https://arxiv.org/abs/2212.09748) with normalised queries and keys (https://arxiv.org/abs/2302.05442) and
rotary positions in time, height and width. Heads are 128 wide by design: attention kernels are fastest there.
Modules that CogVideoX has too keep its names, so sharding, adapters and named groups know both. It is read
and written by diffusers' ModelMixin (config.json, safetensors), but no pipeline of diffusers runs it.

L tokens of the stream, V video tokens, X prompt tokens, B clips; E width of the model, P elements of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from trainer.attention import AttentionFunction, CrossAttentionFunction
from trainer.collate import PackedInputs
from trainer.layout import Layout
from trainer.long_context import LongContext
from trainer.modulation import modulate, rotate, rows_of

WAVES = 256
"""Sines and cosines that a timestep is first written in, as many as in DiT."""


class PackedDiT(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as all models of diffusers
    """The transformer; its config has CogVideoX's names for what both have.

    `text = "joint"`: prompt tokens are part of the stream and modulated apart from video. `"cross"`: every
    block has a layer in which video attends to its clip's prompt. Either way the prompt passes a projector of
    two layers first. With `in_channels = 2 * out_channels` the further ones are the first frame's condition.
    """

    layout: Layout
    route: str
    attention: AttentionFunction
    cross_attention: CrossAttentionFunction
    context_attention: AttentionFunction

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_layers: int = 2,
        num_attention_heads: int = 4,
        attention_head_dim: int = 128,
        time_embed_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_embed_dim: int = 4096,
        max_text_seq_length: int = 226,
        patch_size: int = 2,
        patch_size_t: int = 1,
        text: Literal["joint", "cross"] = "joint",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if text not in ("joint", "cross"):
            raise ValueError(f"expected text = 'joint' or 'cross', found {text!r}")
        width = num_attention_heads * attention_head_dim
        cells = patch_size_t * patch_size**2
        self.time_proj = Timesteps(WAVES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(WAVES, time_embed_dim)
        self.patch_embed = nn.Linear(in_channels * cells, width)
        self.text_projector = PixArtAlphaTextProjection(text_embed_dim, width)
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(width, head_dim=attention_head_dim, time_width=time_embed_dim, text=text)
            for _ in range(num_layers)
        )
        self.norm_out = ModulatedNorm(width, time_width=time_embed_dim, parts=2)
        self.proj_out = nn.Linear(width, out_channels * cells)

    def forward(self, inputs: PackedInputs) -> torch.Tensor:
        """Packed inputs -> [V, P], patches in the order of `inputs.video`, in the compute type."""
        dtype = self.patch_embed.weight.dtype
        temb = self.time_embedding(self.time_proj(inputs.timesteps).to(dtype))
        video, text = self.patch_embed(inputs.video.to(dtype)), self.text_projector(inputs.text.to(dtype))
        x = torch.cat([video, text]).index_select(0, inputs.order)
        for block in self.transformer_blocks:
            x = block(x, temb, text, inputs, self.attention, self.context_attention, self.cross_attention)
        x = x.index_select(0, inputs.video_places)
        row = inputs.modulation_row.index_select(0, inputs.video_places)
        out = self.norm_out
        shift, scale = rows_of(out.linear(out.silu(temb)), row).chunk(2, dim=1)
        prediction: torch.Tensor = self.proj_out(out.norm(x) * (1 + scale) + shift)
        return prediction


class DiTBlock(nn.Module):
    """Attention within spans, with `text = "cross"` attention to the prompt, and a feed-forward."""

    def __init__(
        self, width: int, *, head_dim: int, time_width: int, text: Literal["joint", "cross"]
    ) -> None:
        super().__init__()
        self.kinds = 2 if text == "joint" else 1
        self.norm1 = ModulatedNorm(width, time_width=time_width, parts=3 * self.kinds)
        self.attn1 = HeadProjections(width, head_dim=head_dim)
        self.long_context: LongContext | None = None
        self.norm_cross = nn.LayerNorm(width, eps=1e-6) if text == "cross" else None
        self.cross = HeadProjections(width, head_dim=head_dim) if text == "cross" else None
        self.norm2 = ModulatedNorm(width, time_width=time_width, parts=3 * self.kinds)
        self.ff = FeedForward(width, activation_fn="gelu-approximate")

    def forward(
        self,
        x: torch.Tensor,
        temb: torch.Tensor,
        text: torch.Tensor,
        inputs: PackedInputs,
        attention: AttentionFunction,
        context: AttentionFunction,
        cross: CrossAttentionFunction,
    ) -> torch.Tensor:
        """[L, E], [B, time width], [X, E] -> [L, E]."""
        return self.feed(self.attend(x, temb, text, inputs, attention, context, cross), temb, inputs)

    def attend(
        self,
        x: torch.Tensor,
        temb: torch.Tensor,
        text: torch.Tensor,
        inputs: PackedInputs,
        attention: AttentionFunction,
        context: AttentionFunction,
        cross: CrossAttentionFunction,
    ) -> torch.Tensor:
        """The stream after all attention."""
        h, gate = modulate(self.norm1, x, temb, inputs.modulation_row, kinds=self.kinds)
        q, k, v = self.attn1.heads(h, h)
        if inputs.cos is not None and inputs.sin is not None:
            q, k = rotate(q, inputs.cos, inputs.sin), rotate(k, inputs.cos, inputs.sin)
        out = attention(q, k, v, inputs.cu_seqlens, inputs.max_seqlen)
        x = x + gate * self.attn1.to_out[0](out.flatten(1))
        if self.long_context is not None:
            x = x + self.long_context(h, inputs, context)
        if self.cross is not None and self.norm_cross is not None:
            q, k, v = self.cross.heads(self.norm_cross(x), text)
            bounds = (inputs.clip_seqlens, inputs.text_seqlens, inputs.max_clip, inputs.max_text)
            x = x + self.cross.to_out[0](cross(q, k, v, *bounds).flatten(1))
        return x

    def feed(self, x: torch.Tensor, temb: torch.Tensor, inputs: PackedInputs) -> torch.Tensor:
        """The stream after the feed-forward."""
        h, gate = modulate(self.norm2, x, temb, inputs.modulation_row, kinds=self.kinds)
        out: torch.Tensor = x + gate * self.ff(h)
        return out


class ModulatedNorm(nn.Module):
    """A norm and the layer that gives it shift, scale and gate from the timestep (`trainer.modulation`)."""

    def __init__(self, width: int, *, time_width: int, parts: int) -> None:
        super().__init__()
        self.silu = nn.SiLU()
        self.linear = nn.Linear(time_width, parts * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class HeadProjections(nn.Module):
    """The matrices of one attention layer, and the norms of its queries and keys."""

    def __init__(self, width: int, *, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)

    def heads(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of `x` [L, E], keys and values of `y` [X, E]: [L, N, D], [X, N, D], [X, N, D]."""
        q, k, v = self.to_q(x), self.to_k(y), self.to_v(y)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        return self.norm_q(q), self.norm_k(k), v


def dit_layout(
    config: Mapping[str, Any], *, local_frames: int, leading_frames: int, long_context: bool
) -> Layout:
    """The token stream that a PackedDiT of `config` takes."""
    head_dim = config["attention_head_dim"]
    return Layout(
        patch=config["patch_size"],
        patch_t=config["patch_size_t"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        head_dim=head_dim,
        width=config["num_attention_heads"] * head_dim,
        positions="counted",
        base=(1, 1, 1),
        max_text=config["max_text_seq_length"],
        image=config["in_channels"] == 2 * config["out_channels"],
        text=config["text"],
        local_frames=local_frames,
        leading_frames=leading_frames,
        long_context=long_context,
    )
