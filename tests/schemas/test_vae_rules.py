"""Named scaling rules against the arithmetic of each family's own pipeline in diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline

from schemas.errors import ConfigError
from schemas.scaling import Scaling, most_latent_frames, scale, scale_image, unscale
from schemas.vae_rules import require_known, vae_image_scaling, vae_scaling

C, T = 3, 2
MEAN, STD = [0.5, -1.0, 2.0], [2.0, 0.25, 1.5]


def latents() -> torch.Tensor:
    """[B, T, C, H, W]."""
    return torch.randn(2, T, C, 4, 4, generator=torch.Generator().manual_seed(0))


def channel_first(values: torch.Tensor) -> torch.Tensor:
    return values.transpose(1, 2)


def check(rule: Scaling, pipeline_scaled: torch.Tensor, pipeline_unscaled: torch.Tensor) -> None:
    """`pipeline_...` are what a pipeline makes of `latents`, channels first."""
    for values in (latents(), latents().numpy()):
        np.testing.assert_allclose(scale(values, rule), channel_first(pipeline_scaled), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(
            unscale(values, rule), channel_first(pipeline_unscaled), rtol=1e-6, atol=1e-6
        )
        np.testing.assert_allclose(unscale(scale(values, rule), rule), latents(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["CogVideoX", "HunyuanVideo", "HunyuanVideo15", "Allegro", "Magvit", "TemporalDecoder"],
)
def test_a_factor_is_multiplied(name: str) -> None:
    rule = vae_scaling(
        f"AutoencoderKL{name}", {"scaling_factor": 0.7, "latents_mean": None, "shift_factor": 1.0}
    )
    z = channel_first(latents())
    check(rule, z * 0.7, 1 / 0.7 * z)


def test_pictures_of_sd3_and_flux_are_shifted_first() -> None:
    rule = vae_scaling("AutoencoderKL", {"scaling_factor": 1.5305, "shift_factor": 0.0609})
    z = channel_first(latents())
    check(rule, (z - 0.0609) * 1.5305, (z / 1.5305) + 0.0609)


@pytest.mark.parametrize("name", ["Wan", "QwenImage"])
def test_wan_and_its_kin_scale_by_channel(name: str) -> None:
    rule = vae_scaling(f"AutoencoderKL{name}", {"latents_mean": MEAN, "latents_std": STD})
    z = channel_first(latents())
    mean = torch.tensor(MEAN).view(1, C, 1, 1, 1)
    inverse = 1.0 / torch.tensor(STD).view(1, C, 1, 1, 1)
    check(rule, (z - mean) * inverse, z / inverse + mean)


@pytest.mark.parametrize("name", ["LTXVideo", "LTX2Video"])
def test_ltx_scales_by_what_is_in_its_weights(name: str) -> None:
    buffers = {"latents_mean": MEAN, "latents_std": STD}
    rule = vae_scaling(f"AutoencoderKL{name}", {"scaling_factor": 2.0}, buffers=buffers)
    z, mean, std = channel_first(latents()), torch.tensor(MEAN), torch.tensor(STD)
    check(
        rule,
        LTXPipeline._normalize_latents(z, mean, std, 2.0),
        LTXPipeline._denormalize_latents(z, mean, std, 2.0),
    )


def test_mochi_scales_by_channel_and_factor() -> None:
    config = {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 2.0}
    z = channel_first(latents())
    mean, std = torch.tensor(MEAN).view(1, C, 1, 1, 1), torch.tensor(STD).view(1, C, 1, 1, 1)
    check(vae_scaling("AutoencoderKLMochi", config), (z - mean) / std * 2.0, z * std / 2.0 + mean)


def test_cosmos_scales_by_channel_and_frame_and_knows_so_many() -> None:
    generator = np.random.default_rng(0)
    mean, std = generator.standard_normal(C * 4).tolist(), generator.uniform(0.5, 2, C * 4).tolist()
    config: dict[str, Any] = {"latents_mean": mean, "latents_std": std, "scaling_factor": 1.0}
    rule = vae_scaling("AutoencoderKLCosmos", config, sigma_data=0.5)
    z = channel_first(latents())
    first_mean = torch.tensor(mean).view(1, C, -1, 1, 1)[:, :, :T]
    first_std = torch.tensor(std).view(1, C, -1, 1, 1)[:, :, :T]
    check(rule, (z - first_mean) * 0.5 / first_std, z * first_std / 0.5 + first_mean)
    assert most_latent_frames(rule, C) == 4
    with pytest.raises(ValueError, match="at most 4 latent frames"):
        scale(np.zeros((5, C, 1, 1), np.float32), rule)
    no_table = {"latents_mean": None, "latents_std": None}
    check(vae_scaling("AutoencoderKLCosmos", no_table, sigma_data=0.5), z * 0.5, z / 0.5)


def test_image_latents_of_cogvideox_1_5_are_divided() -> None:
    values = latents().numpy()
    for inverted, want in ((False, values * np.float32(0.7)), (True, values / np.float32(0.7))):
        config = {"scaling_factor": 0.7, "invert_scale_latents": inverted}
        rule = vae_scaling("AutoencoderKLCogVideoX", config)
        np.testing.assert_allclose(scale_image(values, rule, vae_image_scaling(config)), want, rtol=1e-6)


def test_a_picture_vae_with_means_scales_as_the_pipeline_of_sdxl_does() -> None:
    """Playground v2.5."""
    config = {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.5, "shift_factor": None}
    z = channel_first(latents())
    mean, std = torch.tensor(MEAN).view(1, C, 1, 1, 1), torch.tensor(STD).view(1, C, 1, 1, 1)
    check(vae_scaling("AutoencoderKL", config), (z - mean) * 0.5 / std, z * std / 0.5 + mean)


def test_other_classes_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="here is a AutoencoderOobleck: expected one of AutoencoderKLCogV"):
        require_known("AutoencoderOobleck", key="here")
