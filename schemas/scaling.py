"""Latent scaling as a named rule: one function for training, inspection and export.

Stored latents are unscaled; a diffusion model wants them near zero mean and unit variance. Works on
numpy arrays and torch tensors alike, by arithmetic only. Shapes: [..., T, C, H, W].
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import model_validator

from schemas.config import Settings


class Scaling(Settings):
    """`factor`: (x - shift) * factor (CogVideoX: 1.15258426 for 2B, 0.7 for 5B; a shift in SD3 and Flux).

    `per_channel`: (x - mean) / std * factor (Wan, LTX, Mochi).

    `per_channel_and_frame`: the same with a mean and a std for each channel and latent frame, all frames of
    the first channel first (Cosmos; factor is its scheduler's sigma_data).
    """

    rule: Literal["none", "factor", "per_channel", "per_channel_and_frame"]
    factor: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _agree(self) -> Scaling:
        if self.rule.startswith("per_channel") and not (self.mean and len(self.mean) == len(self.std)):
            raise ValueError(f"expected as many means as stds, found {len(self.mean)} and {len(self.std)}")
        if self.factor == 0:
            raise ValueError("factor = 0 leaves nothing of the latents")
        return self


ImageLatents = Literal["none", "first_latent", "apart"]
"""Where a clip's first frame encoded alone is: nowhere, in the clip's first latent frame, or stored apart."""
ImageScaling = Literal["as_video", "inverted"]
"""What becomes of image latents, the condition of image-to-video: scaled like the clip's, or divided by the
factor that those are multiplied with (CogVideoX 1.5, `invert_scale_latents`)."""


def scale(latents: Any, scaling: Scaling) -> Any:
    """Stored -> what the transformer sees."""
    if scaling.rule.startswith("per_channel"):
        mean, std = _columns(scaling, latents)
        scaled = (latents - mean) / std
        return scaled if scaling.factor == 1 else scaled * scaling.factor
    return (latents - scaling.shift if scaling.shift else latents) * scaling.factor


def unscale(latents: Any, scaling: Scaling) -> Any:
    """What the transformer sees -> stored."""
    if scaling.rule.startswith("per_channel"):
        mean, std = _columns(scaling, latents)
        return latents * (std if scaling.factor == 1 else std / scaling.factor) + mean
    unscaled = latents / scaling.factor
    return unscaled + scaling.shift if scaling.shift else unscaled


def scale_image(latents: Any, scaling: Scaling, image_scaling: ImageScaling) -> Any:
    """Stored image latents -> what the transformer sees."""
    return latents / scaling.factor if image_scaling == "inverted" else scale(latents, scaling)


def most_latent_frames(scaling: Scaling, channels: int) -> int | None:
    """T up to which the rule says anything; None where it holds for any."""
    return len(scaling.mean) // channels if scaling.rule == "per_channel_and_frame" else None


def _columns(scaling: Scaling, like: Any) -> tuple[Any, Any]:
    """Mean and std in the array type of `like` [..., T, C, H, W], in a shape that broadcasts."""
    frames, channels = like.shape[-4] if like.ndim > 3 else 1, like.shape[-3]
    known = most_latent_frames(scaling, channels) or len(scaling.mean) // channels
    if known * channels != len(scaling.mean) or (scaling.rule == "per_channel" and known != 1):
        raise ValueError(f"expected {len(scaling.mean)} channels at dim -3, found {like.shape = }")
    if scaling.rule == "per_channel_and_frame" and frames > known:
        raise ValueError(f"expected at most {known} latent frames at dim -4, found {like.shape = }")

    def column(values: tuple[float, ...]) -> Any:
        table = np.asarray(values, np.float32).reshape(channels, known, 1, 1).swapaxes(0, 1)
        table = table[:frames] if scaling.rule == "per_channel_and_frame" else table[0]
        table = np.ascontiguousarray(table)
        return table if isinstance(like, np.ndarray) else like.new_tensor(table)

    return column(scaling.mean), column(scaling.std)
