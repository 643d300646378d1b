"""Transformers that benchmarks train with random weights: published shapes, and one that any CPU manages."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

from schemas.errors import ConfigError
from trainer.architecture import Architecture
from trainer.flops import Flops, PackShape, pack_flops
from trainer.objective import Schedule

_COGVIDEOX: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(CogVideoXTransformer3DModel.__init__).parameters.items()
    if name != "self"
}
"""The class's defaults are those of CogVideoX-2B."""

_SHAPES: dict[str, dict[str, Any]] = {
    # transformer/config.json of THUDM/CogVideoX-5b
    "cogvideox-5b": _COGVIDEOX
    | {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    "cogvideox-2b": _COGVIDEOX,
    "dit": {
        "num_layers": 28,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "time_embed_dim": 512,
        "in_channels": 16,
        "out_channels": 16,
        "text_embed_dim": 4096,
        "max_text_seq_length": 226,
        "patch_size": 2,
        "patch_size_t": 1,
        "text": "joint",
    },
    "tiny": _COGVIDEOX
    | {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "time_embed_dim": 64,
        "text_embed_dim": 64,
        "use_rotary_positional_embeddings": True,
    },
}
MODELS = tuple(_SHAPES)


def architecture_of(model: str) -> Architecture:
    """One of MODELS; ConfigError for another name."""
    if model not in _SHAPES:
        raise ConfigError(f"--model {model}: expected one of {', '.join(MODELS)}")
    kind: Literal["cogvideox", "dit"] = "dit" if model == "dit" else "cogvideox"
    return Architecture(kind=kind, config=dict(_SHAPES[model]), schedule=Schedule())


def clip_flops(architecture: Architecture, *, tokens: int, prompt: int) -> Flops:
    """Operations of a clip alone, of so many tokens with those of its prompt."""
    shape = PackShape(tokens - prompt, spans=(tokens,), clips=(tokens,), prompts=(prompt,))
    return pack_flops(architecture, shape)
