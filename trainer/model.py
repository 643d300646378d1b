"""The packed CogVideoX transformer: one flat token stream of many clips in, a prediction per video token out.

Subclasses of diffusers' own modules with another `forward`: every parameter keeps its name, so
published weights load as they are and trained ones open in the stock pipeline. diffusers modulates,
embeds and splits text from video per batch row; here each of these is a gather by clip. Sources:
diffusers' cogvideox_transformer_3d.py, embeddings.py and normalization.py, which the tests compare with.

L tokens of the stream, V video and X prompt tokens, B clips, E width of the model, P channels of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock, CogVideoXTransformer3DModel

from schemas.errors import ConfigError
from trainer.architecture import Architecture
from trainer.attention import Attention, AttentionFunction
from trainer.collate import PackedInputs
from trainer.dit import PackedDiT
from trainer.layout import Layout
from trainer.long_context import LongContext, linear_attention
from trainer.modulation import modulate, rotate, rows_of

OFS = 2.0
"""What diffusers' pipeline and THUDM's training give the image-to-video model of CogVideoX 1.5 as `ofs`."""


class PackedBlock(CogVideoXBlock):
    """One transformer block on a flat stream."""

    long_context: LongContext | None

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        temb: torch.Tensor,
        inputs: PackedInputs,
        attention: AttentionFunction,
        context: AttentionFunction,
    ) -> torch.Tensor:
        """[L, E], [B, time_embed_dim] -> [L, E]."""
        # temb is an argument of its own: FSDP reduces a block's gradients once those of the tensors
        # it was called with are known, and the modulation layers reach only temb.
        return self.feed(self.attend(x, temb, inputs, attention, context), temb, inputs)

    def attend(
        self,
        x: torch.Tensor,
        temb: torch.Tensor,
        inputs: PackedInputs,
        attention: AttentionFunction,
        context: AttentionFunction,
    ) -> torch.Tensor:
        """The stream after attention."""
        h, gate = modulate(self.norm1, x, temb, inputs.modulation_row)
        attn: Any = self.attn1
        head_dim = attn.inner_dim // attn.heads
        q, k, v = (layer(h).unflatten(-1, (-1, head_dim)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        if inputs.cos is not None and inputs.sin is not None:
            q, k = rotate(q, inputs.cos, inputs.sin), rotate(k, inputs.cos, inputs.sin)
        out = attention(q, k, v, inputs.cu_seqlens, inputs.max_seqlen)
        x = x + gate * attn.to_out[0](out.flatten(1))
        if self.long_context is not None:
            x = x + self.long_context(h, inputs, context)
        return x

    def feed(self, x: torch.Tensor, temb: torch.Tensor, inputs: PackedInputs) -> torch.Tensor:
        """The stream after the feed-forward."""
        h, gate = modulate(self.norm2, x, temb, inputs.modulation_row)
        return x + gate * self.ff(h)


class PackedCogVideoX(CogVideoXTransformer3DModel):
    """CogVideoXTransformer3DModel on packs; make it with `build_model`."""

    layout: Layout
    route: str
    attention: AttentionFunction
    context_attention: AttentionFunction

    def forward(self, inputs: PackedInputs) -> torch.Tensor:
        """Packed inputs -> [V, P], patches in the order of `inputs.video`, in the compute type."""
        embed: Any = self.patch_embed
        dtype = embed.proj.weight.dtype
        temb = self.time_embedding(self.time_proj(inputs.timesteps).to(dtype))
        if self.ofs_proj is not None and self.ofs_embedding is not None:
            ofs = inputs.timesteps.new_full((1,), OFS, dtype=torch.float32)
            temb = temb + self.ofs_embedding(self.ofs_proj(ofs).to(dtype))
        video = F.linear(inputs.video.to(dtype), embed.proj.weight.flatten(1), embed.proj.bias)
        if inputs.positions is not None:
            video = video + inputs.positions.to(dtype)
        rows = torch.cat([video, embed.text_proj(inputs.text.to(dtype))])
        if inputs.learned_row is not None:
            rows = rows + embed.pos_embedding[0].index_select(0, inputs.learned_row).to(dtype)
        x = rows.index_select(0, inputs.order)
        for block in self.transformer_blocks:
            x = block(x, temb, inputs, self.attention, self.context_attention)
        x = self.norm_final(x.index_select(0, inputs.video_places))
        clip = inputs.modulation_row.index_select(0, inputs.video_places)
        shift, scale = rows_of(self.norm_out.linear(self.norm_out.silu(temb)), clip).chunk(2, dim=1)
        prediction: torch.Tensor = self.proj_out(self.norm_out.norm(x) * (1 + scale) + shift)
        return prediction


PackedModel = PackedCogVideoX | PackedDiT
"""A module with `layout` and `transformer_blocks` that takes PackedInputs and gives [V, P]."""


def build_model(architecture: Architecture, attention: Attention) -> PackedModel:
    """The model of `architecture`, on the default device; ConfigError where packing does not cover it."""
    model: PackedModel
    try:
        if architecture.kind == "dit":
            model = dit = PackedDiT(**architecture.config)
            dit.cross_attention = attention.cross
        else:
            check_supported(architecture.config)
            model = PackedCogVideoX(**architecture.config)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        raise ConfigError(f"the model's config cannot be built: {error}") from error
    model.layout = layout = architecture.layout
    model.route = attention.name
    model.attention = attention.function
    model.context_attention = linear_attention
    linear = architecture.long_context == "linear"
    block: Any
    for block in model.transformer_blocks:
        if isinstance(block, CogVideoXBlock):
            block.__class__ = PackedBlock
        block.long_context = LongContext(layout.width, head_dim=layout.head_dim) if linear else None
    return model


def check_supported(config: Mapping[str, Any]) -> None:
    """ConfigError naming what a model needs that packed training does not have."""
    problems = []
    if config["in_channels"] not in (config["out_channels"], 2 * config["out_channels"]):
        problems.append(f"in_channels {config['in_channels']} for out_channels {config['out_channels']}")
    if config["dropout"]:
        problems.append(f"dropout = {config['dropout']!r}")
    if problems:
        raise ConfigError(
            "model.init: CogVideoX 1.0 and 1.5, text to video and image to video, can be trained; this model "
            "needs " + ", ".join(problems)
        )
