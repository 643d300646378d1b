"""Tiny VAEs of diffusers' real classes, one per family, with random weights, saved as a user has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.video_processor import VideoProcessor

_EIGHTS = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
_WAN = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
_LTX = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
}
_DOWN_2D = ("DownEncoderBlock2D",) * 4
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "cogvideox": (
        "AutoencoderKLCogVideoX",
        # Tiles are half of the sample, and their steps whole latent cells.
        {**_EIGHTS, "latent_channels": 4, "sample_height": 96, "sample_width": 80},
    ),
    "wan2.1": ("AutoencoderKLWan", _WAN),
    "wan2.2": (
        "AutoencoderKLWan",
        {
            **_WAN,
            "decoder_base_dim": 4,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
    ),
    "hunyuanvideo": ("AutoencoderKLHunyuanVideo", {**_EIGHTS, "latent_channels": 4}),
    "hunyuanvideo1.5": (
        "AutoencoderKLHunyuanVideo15",
        {"block_out_channels": (8, 8, 8, 8, 8), "layers_per_block": 1, "latent_channels": 4},
    ),
    "ltx": (
        "AutoencoderKLLTXVideo",
        {
            **_LTX,
            "decoder_block_out_channels": (8, 8, 8, 8),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
        },
    ),
    "ltx2": (
        "AutoencoderKLLTX2Video",
        {
            **_LTX,
            "decoder_block_out_channels": (8, 16, 32),
            "decoder_layers_per_block": (1, 1, 1, 1),
        },
    ),
    "mochi": (
        "AutoencoderKLMochi",
        {
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
        },
    ),
    "allegro": ("AutoencoderKLAllegro", {**_EIGHTS, "sample_size": 136}),
    "cosmos": (
        "AutoencoderKLCosmos",
        {
            "encoder_block_out_channels": (8, 8, 8, 8),
            "decode_block_out_channels": (8, 8, 8, 8),
            "num_layers": 1,
            "resolution": 64,
        },
    ),
    "magvit": ("AutoencoderKLMagvit", {**_EIGHTS, "latent_channels": 4}),
    "qwenimage": ("AutoencoderKLQwenImage", _WAN),
    "image": (
        "AutoencoderKL",
        {
            **_EIGHTS,
            "down_block_types": _DOWN_2D,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "scaling_factor": 1.5,
            "shift_factor": 0.06,
        },
    ),
    "temporal_decoder": (
        "AutoencoderKLTemporalDecoder",
        {"block_out_channels": (32, 32, 32, 32), "down_block_types": _DOWN_2D},
    ),
}


def save_vae(family: str, folder: Path, **changes: Any) -> Path:
    """Write the VAE of a family to `folder`; `changes` to its arguments."""
    name, arguments = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = getattr(diffusers, name)(**{**arguments, **changes})
        buffers = dict(vae.named_buffers())  # LTX has its scaling in the weights
        for buffer, value in (("latents_mean", 0.25), ("latents_std", 2.0)):
            if buffer in buffers:
                buffers[buffer].add_(torch.linspace(0, value, len(buffers[buffer])))
        vae.save_pretrained(folder)
    if family == "cosmos":  # is scaled by its pipeline's scheduler too
        scheduler = folder.parent / "scheduler" / "scheduler_config.json"
        scheduler.parent.mkdir(exist_ok=True)
        scheduler.write_text('{"sigma_data": 0.5}')
    return folder


def library_vae(family: str, folder: Path) -> Any:
    """The same, as anyone would load it."""
    vae = getattr(diffusers, FAMILIES[family][0]).from_pretrained(folder, low_cpu_mem_usage=False).eval()
    if family == "allegro":
        vae.enable_tiling()
    return vae


def library_frames(clips: np.ndarray) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] -> [B, 3, F, H, W] as diffusers' pipelines prepare videos."""
    values = [clip.astype(np.float32) / 255 for clip in clips]
    frames: torch.Tensor = VideoProcessor(do_resize=False).preprocess_video(values)
    return frames
