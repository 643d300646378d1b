"""Validation: held-out clips and a model in; its loss at fixed noise levels out, as one record.

Each clip is noised with the same noise at every level and in every run, and its frames all weigh the same, so
records can be held against each other: over steps, and over runs of one objective, however they pack, weigh
or spread over ranks. The same clips with each other's captions tell whether the model uses them: its price
is as many forward passes again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch

from schemas.errors import RunError
from trainer.batch import prepare
from trainer.collate import PackedInputs
from trainer.layout import Layout, fill_patches
from trainer.losses import clip_losses
from trainer.metrics import duration_sums, loss_by_duration
from trainer.objective import Objective
from trainer.packing import Pack, Segment
from trainer.parallel import World
from trainer.stage_plan import Read, counted

Predict = Callable[[PackedInputs], torch.Tensor]
"""The model as all ranks run it together: inputs on the host in, [V, P] out. Every rank calls it as often
as the others do."""


class Reader(Protocol):
    """Reads clips that all ranks know of; the loader is one."""

    def read(self, clips: Sequence[Read]) -> Pack:
        """The clips as one pack; of weight 0 what cannot be read."""

    def prompt(self, clip: Read) -> torch.Tensor | None:
        """The caption [S, D] of a clip alone; None where it cannot be read."""


@dataclass(frozen=True)
class ValidationRecord:
    """Losses on the held-out clips."""

    kind: ClassVar[str] = "validation"

    step: int
    stage: str
    loss: float
    """Mean over clips and noise levels of the squared error."""
    shuffled_loss: float | None
    """The same with captions exchanged; about equal where the model does not use them. None for one clip."""
    loss_by_timestep: dict[str, float]
    """By noise level, as a share of the schedule."""
    loss_by_duration: dict[str, float]
    """By source seconds, as {"0-3s": 0.41}."""
    clips: int
    seconds: float
    """It took."""

    def __str__(self) -> str:
        levels = ", ".join(f"{loss:.4f} at {level}" for level, loss in self.loss_by_timestep.items())
        shuffled = "" if self.shuffled_loss is None else f"; captions exchanged {self.shuffled_loss:.4f}"
        return f"validation: loss {self.loss:.4f} of {counted(self.clips, 'clip')} ({levels}){shuffled}"


@torch.no_grad()
def validate(
    predict: Predict,
    packs: Sequence[Sequence[Read]],
    *,
    reader: Reader,
    step: int,
    stage: str,
    objective: Objective,
    layout: Layout,
    timesteps: Sequence[float],
    world: World,
) -> ValidationRecord:
    """Losses of `packs`, the same list on every rank, at `timesteps` (shares of the schedule).

    Data-parallel ranks share the packs, and read what they run; the record is the same on all. A clip is left
    out where it, or the caption it is to get, cannot be read; RunError where that is so of all.
    """
    started = time.perf_counter()
    visits = [visit for pack in packs for _, visit in pack]
    partners = exchanged([read for pack in packs for read in pack])
    firsts = [0, *itertools.accumulate(map(len, packs))]
    table = torch.zeros(len(visits), 2, len(timesteps), dtype=torch.float64)  # clip; own or exchanged caption
    readable = torch.zeros(len(visits), dtype=torch.float64)
    for place in shared_places(len(packs), world=world):
        # A rank whose share is one short repeats the last pack, as the others wait for it, and leaves it out.
        reads = packs[min(place, len(packs) - 1)]
        clips = [replace(clip, frame_weights=None) for clip in reader.read(reads).segments]
        prompts = [reader.prompt(partners[visit.key]) for _, visit in reads if partners]
        noises = [_noise(clip, objective=objective, layout=layout) for clip in clips]
        for caption, shown in enumerate([clips, _with(prompts, clips)] if partners else [clips]):
            for level, share in enumerate(timesteps):
                batch = prepare(
                    Pack(tuple(shown)),
                    objective=objective,
                    layout=layout,
                    timestep=objective.timestep_at(share),
                    noises=noises,
                )
                errors = clip_losses(predict(batch.inputs), batch.to(world.device))
                if place < len(packs):
                    table[firsts[place] : firsts[place + 1], caption, level] = errors.double().cpu()
        if place < len(packs):
            there = [clip.weight > 0 for clip in _with(prompts, clips)]
            readable[firsts[place] : firsts[place + 1]] = torch.tensor(there).double()
    # Peers that share a pack all have its numbers.
    numbers = torch.cat([readable, table.flatten()]) / world.shape.sp
    readable, flat = torch.tensor(world.sum(numbers.tolist())).split([len(visits), table.numel()])
    if not readable.any():
        raise RunError(
            f"validation: of {counted(len(visits), 'clip')} none can be read; `latentpress verify` says more"
        )
    own, exchanged_loss = flat.view_as(table)[readable > 0].unbind(1)
    seconds = [visit.seconds for visit, there in zip(visits, readable.tolist(), strict=True) if there]
    return ValidationRecord(
        step=step,
        stage=stage,
        loss=own.mean().item(),
        shuffled_loss=exchanged_loss.mean().item() if partners else None,
        loss_by_timestep={f"{t:g}": x for t, x in zip(timesteps, own.mean(0).tolist(), strict=True)},
        loss_by_duration=loss_by_duration(duration_sums(seconds, own.mean(1).tolist())),
        clips=len(own),
        seconds=time.perf_counter() - started,
    )


def shared_places(count: int, *, world: World) -> range:
    """This data-parallel rank's places of a list of `count`: equally many on all, the last perhaps beyond."""
    rounds = -(-count // world.dp_size)
    return range(world.dp_rank, world.dp_rank + rounds * world.dp_size, world.dp_size)


def exchanged(clips: Sequence[Read]) -> dict[str, Read]:
    """Key of each visit -> the visit whose caption it gets, however they are packed; empty for a single one.

    Half of all visits, in the order of their keys, lie between the two: a clip's own captions are neighbours.
    """
    ordered = sorted(clips, key=lambda read: read[1].key)
    half = len(ordered) // 2
    if not half:
        return {}
    return {
        visit.key: other for (_, visit), other in zip(ordered, ordered[half:] + ordered[:half], strict=True)
    }


def _with(prompts: Sequence[torch.Tensor | None], clips: Sequence[Segment]) -> list[Segment]:
    """The clips with other prompts, if any; of weight 0 where the prompt could not be read."""
    if not prompts:
        return list(clips)
    return [
        replace(clip, weight=0.0) if prompt is None else replace(clip, prompt_embeds=prompt)
        for clip, prompt in zip(clips, prompts, strict=True)
    ]


def _noise(clip: Segment, *, objective: Objective, layout: Layout) -> torch.Tensor:
    """Drawn once for all levels: it costs more than the mixing."""
    return objective.noise(fill_patches(clip.latents, patch_t=layout.patch_t).shape, key=clip.key)
