"""The packed CogVideoX transformer: one flat token stream of many clips in, a prediction per video token out.

Subclasses of diffusers' own modules with another `forward`: every parameter keeps its name, so
published weights load as they are and trained ones open in the stock pipeline. diffusers modulates,
embeds and splits text from video per batch row; here each of these is a gather by segment. Sources:
diffusers' cogvideox_transformer_3d.py and normalization.py, which the tests compare with.

L tokens of the stream, V video tokens, B segments, E width of the model, P channels of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock, CogVideoXTransformer3DModel

from schemas.errors import ConfigError
from trainer.attention import AttentionFunction
from trainer.collate import PackedInputs


class PackedBlock(CogVideoXBlock):
    """One transformer block on a flat stream."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, temb: torch.Tensor, inputs: PackedInputs, attention: AttentionFunction
    ) -> torch.Tensor:
        """[L, E], [B, time_embed_dim] -> [L, E]."""
        # temb is an argument of its own: FSDP reduces a block's gradients once those of the tensors
        # it was called with are known, and the modulation layers reach only temb.
        h, gate = _modulate(self.norm1, x, temb, inputs.modulation_row)
        attn: Any = self.attn1
        q, k, v = (layer(h).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        if inputs.cos is not None and inputs.sin is not None:
            q, k = _rotate(q, inputs.cos, inputs.sin), _rotate(k, inputs.cos, inputs.sin)
        out = attention(q, k, v, inputs.cu_seqlens, inputs.max_seqlen)
        x = x + gate * attn.to_out[0](out.flatten(1))
        h, gate = _modulate(self.norm2, x, temb, inputs.modulation_row)
        x = x + gate * self.ff(h)
        return x


class PackedCogVideoX(CogVideoXTransformer3DModel):
    """CogVideoXTransformer3DModel on packs; make it with `build`."""

    attention: AttentionFunction

    @classmethod
    def build(cls, config: Mapping[str, Any], *, attention: AttentionFunction) -> PackedCogVideoX:
        """A model of a diffusers config; ConfigError where packing does not cover a feature of it."""
        check_supported(config)
        try:
            model: PackedCogVideoX = cls(**config)
        except (ArithmeticError, RuntimeError, ValueError) as error:
            raise ConfigError(f"the model's config cannot be built: {error}") from error
        for block in model.transformer_blocks:
            block.__class__ = PackedBlock
        model.attention = attention
        return model

    def forward(self, inputs: PackedInputs) -> torch.Tensor:
        """Packed inputs -> [V, P], patches in the order of `inputs.video`, in the compute type."""
        embed = self.patch_embed
        dtype = embed.proj.weight.dtype
        temb = self.time_embedding(self.time_proj(inputs.timesteps).to(dtype))
        video = F.linear(inputs.video.to(dtype), embed.proj.weight.flatten(1), embed.proj.bias)
        if inputs.positions is not None:
            video = video + inputs.positions.to(dtype)
        x = torch.cat([video, embed.text_proj(inputs.text.to(dtype))]).index_select(0, inputs.order)
        for block in self.transformer_blocks:
            x = block(x, temb, inputs, self.attention)
        x = self.norm_final(x.index_select(0, inputs.video_places))
        segment = inputs.modulation_row.index_select(0, inputs.video_places)
        shift, scale = self.norm_out.linear(self.norm_out.silu(temb)).index_select(0, segment).chunk(2, dim=1)
        prediction: torch.Tensor = self.proj_out(self.norm_out.norm(x) * (1 + scale) + shift)
        return prediction


def check_supported(config: Mapping[str, Any]) -> None:
    """ConfigError naming what a model needs that packed training does not have."""
    problems = []
    if config["in_channels"] != config["out_channels"]:
        problems.append(
            f"image conditioning (in_channels {config['in_channels']}, out {config['out_channels']})"
        )
    problems += [
        f"{name} = {config[name]!r}"
        for name in ("ofs_embed_dim", "use_learned_positional_embeddings", "dropout")
        if config.get(name)
    ]
    if problems:
        raise ConfigError(
            "model.init: text-to-video CogVideoX 1.0 and 1.5 can be trained; this model needs "
            + ", ".join(problems)
        )


def _modulate(
    norm: Any, x: torch.Tensor, temb: torch.Tensor, row: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """CogVideoXLayerNormZero on a stream: normalised and modulated x, and the gate, both [L, E]."""
    # [B, (video, text), (shift, scale, gate) * E] -> one row per (kind, segment), gathered once.
    table = norm.linear(norm.silu(temb)).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 1)
    shift, scale, gate = table.index_select(0, row).chunk(3, dim=1)
    return norm.norm(x) * (1 + scale) + shift, gate


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of interleaved pairs [L, N, D], in float32 as diffusers does it."""
    real, imag = torch.unflatten(x.float(), -1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imag, real], dim=-1).flatten(-2)
    return (x.float() * cos[:, None] + turned * sin[:, None]).to(x.dtype)
