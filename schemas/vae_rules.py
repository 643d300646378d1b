"""Which VAE classes of diffusers are known, and the scaling that each family's own pipeline applies.

In: a class name and the VAE's config. Out: the named rule. Nothing else of a VAE is told here: compression,
channels and the frame rule come from the model itself. A class that is not listed is refused, since nothing
in a config says how its pipeline scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from schemas.errors import ConfigError
from schemas.scaling import ImageScaling, Scaling

Rule = Literal["factor", "per_channel", "buffers", "per_channel_and_frame"]

VAE_RULES: dict[str, Rule] = {
    "AutoencoderKLCogVideoX": "factor",
    "AutoencoderKLWan": "per_channel",
    "AutoencoderKLHunyuanVideo": "factor",
    "AutoencoderKLHunyuanVideo15": "factor",
    "AutoencoderKLLTXVideo": "buffers",
    "AutoencoderKLLTX2Video": "buffers",
    "AutoencoderKLMochi": "per_channel",
    "AutoencoderKLAllegro": "factor",
    "AutoencoderKLCosmos": "per_channel_and_frame",
    "AutoencoderKLMagvit": "factor",
    "AutoencoderKLQwenImage": "per_channel",
    "AutoencoderKL": "factor",
    "AutoencoderKLTemporalDecoder": "factor",
}
"""`factor`: config.scaling_factor (and shift_factor); `per_channel`: config.latents_mean and latents_std;
`buffers`: the same as tensors of the weights; `per_channel_and_frame`: of the config, for each of both."""
IMAGE_VAES = ("AutoencoderKL", "AutoencoderKLTemporalDecoder")
"""Encode pictures, so a clip frame by frame."""


def require_known(name: object, *, key: str) -> str:
    """The class name of a VAE's config; ConfigError naming it where it is none of those known."""
    if name in VAE_RULES:
        return str(name)
    if not isinstance(name, str):
        raise ConfigError(f"{key}: its config.json names no class; expected a VAE in the layout of diffusers")
    raise ConfigError(f"{key} is a {name}: expected one of {', '.join(VAE_RULES)}")


def vae_scaling(
    name: str,
    config: Mapping[str, Any],
    *,
    buffers: Mapping[str, Sequence[float]] | None = None,
    sigma_data: float = 1.0,
) -> Scaling:
    """The rule of class `name`, whose `config` holds all arguments of the class.

    `buffers` are the tensors `latents_mean` and `latents_std` of the weights (LTX), `sigma_data` that of the
    scheduler beside the VAE (Cosmos; 1 where there is none). Source: the pipelines of diffusers.
    """
    rule, factor = VAE_RULES[name], float(config.get("scaling_factor") or 1.0)
    if name == "AutoencoderKL" and config.get("latents_mean") and config.get("latents_std"):
        rule = "per_channel"  # Playground v2.5; the pipeline of SDXL then applies no shift
    if rule == "factor":
        # CogVideoX keeps a shift in its config that its pipeline does not apply.
        shift = float(config.get("shift_factor") or 0.0) if name == "AutoencoderKL" else 0.0
        return Scaling(rule="factor", factor=factor, shift=shift)
    source = buffers or {} if rule == "buffers" else config
    mean, std = (tuple(map(float, source.get(f"latents_{each}") or ())) for each in ("mean", "std"))
    if rule == "per_channel_and_frame":
        if not mean:
            return Scaling(rule="factor", factor=sigma_data)
        return Scaling(rule="per_channel_and_frame", factor=sigma_data, mean=mean, std=std)
    if not mean and name == "AutoencoderKLMochi":  # whose pipeline then scales by the factor alone
        return Scaling(rule="factor", factor=factor)
    return Scaling(rule="per_channel", factor=factor, mean=mean, std=std)


def vae_image_scaling(config: Mapping[str, Any]) -> ImageScaling:
    """What becomes of image latents; `invert_scale_latents` is CogVideoX 1.5's."""
    return "inverted" if config.get("invert_scale_latents") else "as_video"
