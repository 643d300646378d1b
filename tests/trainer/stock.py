"""What the trainer is compared with: stock diffusers, one clip at a time, in plain PyTorch.

Also the tiny models, and clips of different lengths, shapes and prompts, that the comparisons run on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler

from schemas.train_config import LossConfig
from trainer.architecture import Architecture
from trainer.attention import Attention, sdpa, sdpa_cross
from trainer.collate import PackedInputs, collate, patchify
from trainer.layout import fill_patches
from trainer.model import PackedModel, build_model
from trainer.objective import Schedule, make_objective
from trainer.packing import Segment

_BASE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 24,
    "text_embed_dim": 12,
    "num_layers": 2,
    "sample_width": 24,
    "sample_height": 16,
    "sample_frames": 9,
    "max_text_seq_length": 7,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "5b": _BASE | {"use_rotary_positional_embeddings": True},
    "2b": _BASE | {"use_rotary_positional_embeddings": False},
    "1.5": _BASE | {"use_rotary_positional_embeddings": True, "patch_size_t": 2},
    "5b-i2v": _BASE
    | {
        "in_channels": 8,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True,
    },
    "1.5-i2v": _BASE
    | {"in_channels": 8, "use_rotary_positional_embeddings": True, "patch_size_t": 2, "ofs_embed_dim": 24},
}
"""The published variants in small."""

SHAPES = ((3, 12, 16, 7), (1, 8, 12, 7), (5, 16, 8, 7), (2, 8, 8, 7))
"""T, H, W, S of the clips; S is what an absolute-position model insists on."""
KNOWN_SHAPES = ((3, 16, 24, 7),) * 4
"""Those that a model with learned positions takes."""
SDPA = Attention("sdpa", "for tests", sdpa, sdpa_cross)


def stock_model(variant: str, **changes: Any) -> CogVideoXTransformer3DModel:
    """A stock model with all its weights random: also those that start at 0 or 1. `changes`: its config's."""
    model = CogVideoXTransformer3DModel(**CONFIGS[variant] | changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1)
    return model


def tiny_architecture(variant: str, *, local_frames: int = 0) -> Architecture:
    """The stock model's, as a run has it."""
    config = {name: value for name, value in stock_model(variant).config.items() if name[0] != "_"}
    return Architecture("cogvideox", config, Schedule(), local_frames=local_frames)


def packed_model(variant: str, *, local_frames: int = 0) -> PackedModel:
    """The packed model with the same weights."""
    model = build_model(tiny_architecture(variant, local_frames=local_frames), SDPA)
    model.load_state_dict(stock_model(variant).state_dict())
    return model


def clips(shapes: Sequence[tuple[int, int, int, int]] = SHAPES) -> list[Segment]:
    """Random clips; clip i is the same in every list."""
    made = []
    for i, (frames, height, width, tokens) in enumerate(shapes):
        generator = torch.Generator().manual_seed(i)
        made.append(
            Segment(
                sample_id=f"clip{i}",
                key=f"visit{i}",
                latents=torch.randn(frames, 4, height, width, generator=generator),
                prompt_embeds=torch.randn(tokens, 12, generator=generator),
            )
        )
    return made


def clips_for(variant: str) -> list[Segment]:
    """Clips of shapes that a variant takes, with images where it takes them; one visit dropped its own."""
    if not variant.endswith("i2v"):
        return clips()
    made = clips(KNOWN_SHAPES if variant == "5b-i2v" else SHAPES)
    for i, segment in enumerate(made[:-1]):
        generator = torch.Generator().manual_seed(100 + i)
        image = torch.randn(segment.latents[:1].shape, generator=generator)
        made[i] = replace(segment, image_latents=image)
    return made


def pack_inputs(
    segments: Sequence[Segment], *, variant: str, local_frames: int = 0
) -> tuple[PackedInputs, torch.Tensor]:
    """(inputs, target patches) of the v objective for one pack."""
    layout = tiny_architecture(variant, local_frames=local_frames).layout
    objective = make_objective(LossConfig(), Schedule())
    timesteps = [objective.draw_timestep(segment.key) for segment in segments]
    pairs = [
        objective.noised(fill_patches(s.latents, patch_t=layout.patch_t), key=s.key, timestep=t)
        for s, t in zip(segments, timesteps, strict=True)
    ]
    inputs = collate(
        [noisy for noisy, _ in pairs],
        [s.prompt_embeds for s in segments],
        timesteps,
        layout=layout,
        images=[s.image_latents for s in segments],
    )
    targets = [patchify(target, patch=2, patch_t=layout.patch_t) for _, target in pairs]
    return inputs, torch.cat(targets)


def clip_errors(prediction: torch.Tensor, target: torch.Tensor, *, lengths: Sequence[int]) -> torch.Tensor:
    """[B] mean squared error of each clip; both inputs are [V, P], clip after clip of `lengths`."""
    errors = (prediction.float() - target).square().mean(dim=1)
    return torch.stack([clip.mean() for clip in torch.split(errors, list(lengths))])


def stock_rotary(
    model: CogVideoXTransformer3DModel, *, frames: int, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The stock pipeline's tables for latents of this size."""
    if not model.config["use_rotary_positional_embeddings"]:
        return None
    pipeline = SimpleNamespace(transformer=model, vae_scale_factor_spatial=8)
    tables: tuple[torch.Tensor, torch.Tensor] = CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipeline,  # type: ignore[arg-type]
        height * 8,
        width * 8,
        frames,
        torch.device("cpu"),
    )
    return tables


def stock_loss(model: CogVideoXTransformer3DModel, segment: Segment) -> torch.Tensor:
    """One clip's loss as diffusers' examples/cogvideo compute it, on the noise and timestep of our visit."""
    clean = fill_patches(segment.latents, patch_t=model.config["patch_size_t"] or 1)
    objective = make_objective(LossConfig(), Schedule())
    t = torch.tensor([objective.draw_timestep(segment.key)])
    noise = objective.noised(clean, key=segment.key, timestep=999)[0]  # zero SNR: nothing but noise
    scheduler = CogVideoXDDIMScheduler.from_config(Schedule().scheduler_config())
    noisy = scheduler.add_noise(clean[None], noise[None], t)
    frames, _, height, width = clean.shape
    seen = noisy
    if model.config["in_channels"] > clean.shape[1]:
        # As the scripts do: the image, then zeros, on the channel axis, once the clip is filled up.
        image = torch.zeros_like(noisy)
        if segment.image_latents is not None:
            image = torch.cat([segment.image_latents[None], image[:, 1:]], dim=1)
        seen = torch.cat([noisy, image], dim=2)
    output = model(
        seen,
        segment.prompt_embeds[None],
        t,
        ofs=noisy.new_full((1,), 2.0) if model.config["ofs_embed_dim"] else None,
        image_rotary_emb=stock_rotary(model, frames=frames, height=height, width=width),
        return_dict=False,
    )[0]
    predicted = scheduler.get_velocity(output, noisy, t)
    weight = 1 / (1 - scheduler.alphas_cumprod[t])
    loss: torch.Tensor = (weight * (predicted - clean[None]) ** 2).mean()
    return loss
