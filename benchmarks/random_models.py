"""Encoders of the published shapes with random weights, for speed and memory where nothing can be downloaded.

In: a family and a folder. Out: the folder in the layout of a diffusers pipeline, its text tokenizer the
byte one. The numbers such a model gives mean nothing; its time and its memory are those of the published
one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError
from schemas.text_family import FAMILIES, FamilyName

_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
"""google/t5-v1_1-xxl and google/umt5-xxl."""


@dataclass(frozen=True)
class _Shape:
    vae: str
    """Class in diffusers."""
    family: FamilyName | None
    """Of the text encoder; None where it is no T5."""
    text: str = "T5EncoderModel"
    vocab_size: int = 32128
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the class, where its defaults are not the published ones."""


SHAPES = {
    "cogvideox": _Shape("AutoencoderKLCogVideoX", "cogvideox"),
    "wan2.1": _Shape("AutoencoderKLWan", "wan", "UMT5EncoderModel", 256384),
    "wan2.2": _Shape(
        "AutoencoderKLWan",
        "wan",
        "UMT5EncoderModel",
        256384,
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
        },
    ),
    "hunyuanvideo": _Shape("AutoencoderKLHunyuanVideo", None),
    "ltx": _Shape("AutoencoderKLLTXVideo", "ltx"),
    "mochi": _Shape("AutoencoderKLMochi", "mochi"),
}


def overrides(name: str, folder: Path) -> list[str]:
    """Config overrides that name the models of a family in `folder`; ConfigError for others."""
    if name not in SHAPES:
        raise ConfigError(f"no random model {name!r}: expected one of {', '.join(SHAPES)}")
    video = ["video_encoder.kind=diffusers", f"video_encoder.model={folder}"]
    family = SHAPES[name].family
    if family is None:
        return [*video, "text_encoder.kind=tiny-t5"]
    text = {"kind": "t5", "model": folder, "family": family, "max_length": FAMILIES[family].max_length}
    return [*video, *(f"text_encoder.{key}={value}" for key, value in text.items())]


def write(name: str, folder: Path, text: bool) -> None:
    """Save the VAE, and with `text` the text encoder, of a family to `folder`."""
    import diffusers
    import torch
    import transformers
    from transformers import ByT5Tokenizer

    shape = SHAPES[name]
    torch.manual_seed(0)
    getattr(diffusers, shape.vae)(**shape.arguments).save_pretrained(folder / "vae")
    if not text or shape.family is None:
        return
    model = getattr(transformers, shape.text)
    torch.set_default_dtype(torch.bfloat16)  # 19 GB otherwise
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model(model.config_class(vocab_size=shape.vocab_size, **_XXL)).save_pretrained(
            folder / "text_encoder"
        )
    ByT5Tokenizer().save_pretrained(str(folder / "tokenizer"))
