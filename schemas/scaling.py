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
    """`factor`: x * factor (CogVideoX: 1.15258426 for 2B, 0.7 for 5B).

    `per_channel`: (x - mean) / std (Wan).
    """

    rule: Literal["none", "factor", "per_channel"]
    factor: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _agree(self) -> Scaling:
        if self.rule == "per_channel" and not (self.mean and len(self.mean) == len(self.std)):
            raise ValueError(f"expected as many means as stds, found {len(self.mean)} and {len(self.std)}")
        return self


def scale(latents: Any, scaling: Scaling) -> Any:
    """Stored -> what the transformer sees."""
    if scaling.rule == "per_channel":
        return (latents - _per_channel(scaling.mean, latents)) / _per_channel(scaling.std, latents)
    return latents * scaling.factor


def unscale(latents: Any, scaling: Scaling) -> Any:
    """What the transformer sees -> stored."""
    if scaling.rule == "per_channel":
        return latents * _per_channel(scaling.std, latents) + _per_channel(scaling.mean, latents)
    return latents / scaling.factor


def _per_channel(values: tuple[float, ...], like: Any) -> Any:
    """`values` shaped [C, 1, 1] in the array type of `like`."""
    if like.shape[-3] != len(values):
        raise ValueError(f"expected {len(values)} channels at dim -3, found {like.shape = }")
    column = np.asarray(values, np.float32).reshape(-1, 1, 1)
    return column if isinstance(like, np.ndarray) else like.new_tensor(column)
