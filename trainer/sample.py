"""Samples: clips in; clips of the same shapes, drawn by the model from their captions, out.

The loop of diffusers' CogVideoX pipelines around the packed model: the same scheduler, guidance and frame
filling, so a sample is what the exported model gives in the stock pipeline on the same noise. The guided and
the unguided prediction run as two clips of one pack. One clip at a time: more would be faster for small
ones, at the price of a pack without bound.

T, C, H, W latents of one clip, F pixel frames, S prompt tokens, D prompt width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from schemas.codec import as_float32
from schemas.errors import ConfigError
from schemas.index import lacks_empty_prompt, read_empty_prompt
from schemas.train_config import ValidationConfig
from trainer.collate import collate
from trainer.layout import Layout
from trainer.objective import Objective
from trainer.order import keyed_generator
from trainer.packing import Segment
from trainer.parallel import World
from trainer.stage_plan import Read
from trainer.validate import Predict, Reader, shared_places


@dataclass(frozen=True, eq=False)
class Sample:
    """A clip, and what the model makes of its caption."""

    reference: Segment
    latents: torch.Tensor
    """[T, C, H, W] float32, scaled as the reference's."""


class Pictures(Protocol):
    """Makes samples visible; given by whoever can decode latents."""

    def write(self, folder: Path, samples: Sequence[Sample]) -> None:
        """Pictures of all samples beside their references, in a folder that may not be there yet."""


def guidance_prompt(dataset: str | Path, *, guidance: float) -> torch.Tensor | None:
    """The empty prompt [S, D] of a dataset, ConfigError where it has none; None where none is needed."""
    if guidance == 1:
        return None
    if lacks_empty_prompt(dataset):
        raise ConfigError(
            f"validation.guidance = {guidance:g}: {dataset} has no empty prompt to guide against, as it was "
            "imported from a cache without; set validation.guidance = 1"
        )
    return torch.from_numpy(as_float32(read_empty_prompt(dataset)["prompt_embeds"]))


def draw_samples(
    predict: Predict,
    clips: Sequence[Read],
    *,
    reader: Reader,
    objective: Objective,
    layout: Layout,
    config: ValidationConfig,
    empty_prompt: torch.Tensor | None,
    world: World,
) -> list[torch.Tensor]:
    """What the model makes of each clip's caption, [T, C, H, W] as in `Sample`: the same list on every rank.

    Data-parallel ranks share the work, and read what they draw.
    """
    drawn: list[tuple[int, torch.Tensor]] = []
    for place in shared_places(len(clips), world=world):
        # A rank whose share is one short repeats the last, as the others wait for it.
        [reference] = reader.read([clips[min(place, len(clips) - 1)]]).segments
        latents = draw(
            predict,
            reference,
            objective=objective,
            layout=layout,
            steps=config.sample_steps,
            guidance=config.guidance,
            empty_prompt=empty_prompt,
            device=world.device,
        )
        drawn.append((place, latents))
    found = dict(world.gather(drawn))
    return [found[place] for place in range(len(clips))]


@torch.no_grad()
def draw(
    predict: Predict,
    reference: Segment,
    *,
    objective: Objective,
    layout: Layout,
    steps: int,
    guidance: float,
    empty_prompt: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Latents [T, C, H, W] from noise, for the reference's prompt, image condition and shape.

    The noise is fixed by the reference's key. `empty_prompt` [S, D] is what is guided against, if at all.
    """
    frames = len(reference.latents)
    filled = -frames % layout.patch_t  # dropped again: see `fill_patches`
    shape = (frames + filled, *reference.latents.shape[1:])
    latents = torch.randn(shape, generator=keyed_generator(reference.key, "sample"))
    prompts = [reference.prompt_embeds] if empty_prompt is None else [empty_prompt, reference.prompt_embeds]
    images = [reference.image_latents] * len(prompts) if layout.image else None
    scheduler = _scheduler(objective, steps=steps)
    for timestep in scheduler.timesteps:
        inputs = collate(
            [latents] * len(prompts), prompts, [timestep.item()] * len(prompts), layout=layout, images=images
        )
        predictions = predict(inputs).float().cpu().chunk(len(prompts))
        prediction = predictions[0]
        if empty_prompt is not None:
            prediction = prediction + guidance * (predictions[1] - prediction)
        output = unpatchify(prediction, shape=shape, patch=layout.patch, patch_t=layout.patch_t)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return latents[filled:]


def unpatchify(patches: torch.Tensor, *, shape: tuple[int, ...], patch: int, patch_t: int) -> torch.Tensor:
    """[V, C * patch_t * patch * patch] -> [T, C, H, W] = `shape`; undoes `patchify`."""
    frames, channels, height, width = shape
    grid = (frames // patch_t, height // patch, width // patch)
    cut = patches.reshape(*grid, channels, patch_t, patch, patch)
    return cut.permute(0, 4, 3, 1, 5, 2, 6).reshape(shape)


def _scheduler(objective: Objective, *, steps: int) -> Any:
    """diffusers' own, at its first step."""
    kind: Any = FlowMatchEulerDiscreteScheduler if objective.name == "flow" else CogVideoXDDIMScheduler
    scheduler = kind.from_config(objective.scheduler_config())
    scheduler.set_timesteps(steps)
    return scheduler
