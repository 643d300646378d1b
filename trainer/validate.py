"""Validation: held-out packs and a model in; its loss at fixed noise levels out, as one record.

Each clip is noised with the same noise at every level and in every run, and its frames all weigh the same, so
records can be held against each other: over steps, and over runs of one objective, however they pack, weigh
or spread over ranks. The same clips with each other's captions tell whether the model uses them: its price
is as many forward passes again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from trainer.batch import prepare
from trainer.collate import PackedInputs
from trainer.layout import Layout
from trainer.losses import clip_losses
from trainer.metrics import duration_sums, loss_by_duration
from trainer.objective import Objective
from trainer.packing import Pack, Segment
from trainer.parallel import World

Predict = Callable[[PackedInputs], torch.Tensor]
"""The model as all ranks run it together: inputs on the host in, [V, P] out. Every rank calls it as often
as the others do."""


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
        return f"validation: loss {self.loss:.4f} of {self.clips} clips ({levels}){shuffled}"


@torch.no_grad()
def validate(
    predict: Predict,
    packs: Sequence[Pack],
    *,
    step: int,
    stage: str,
    objective: Objective,
    layout: Layout,
    timesteps: Sequence[float],
    world: World,
) -> ValidationRecord:
    """Losses of `packs`, the same list on every rank, at `timesteps` (shares of the schedule).

    Data-parallel ranks share the packs; the record is the same on all.
    """
    started = time.perf_counter()
    prompts = exchanged_prompts(packs)
    firsts = [sum(len(pack.segments) for pack in packs[:i]) for i in range(len(packs) + 1)]
    table = torch.zeros(firsts[-1], 2, len(timesteps), dtype=torch.float64)  # clip; own or exchanged caption
    readable = torch.tensor([float(s.weight) for pack in packs for s in pack.segments], dtype=torch.float64)
    for place in shared_places(len(packs), world=world):
        # A rank whose share is one short repeats its last pack, as the others wait for it, and leaves it out.
        pack = packs[min(place, len(packs) - 1)]
        for caption in range(2 if prompts else 1):
            shown = Pack(tuple(_shown(segment, prompts if caption else {}) for segment in pack.segments))
            for level, share in enumerate(timesteps):
                at = objective.timestep_at(share)
                batch = prepare(shown, objective=objective, layout=layout, timestep=at)
                errors = clip_losses(predict(batch.inputs), batch.to(world.device))
                if place < len(packs):
                    table[firsts[place] : firsts[place + 1], caption, level] = errors.double().cpu()
    total = torch.tensor(world.sum((table / world.shape.sp).flatten().tolist())).view_as(table)
    total = total[readable > 0]
    own, exchanged = total.unbind(1)
    seconds = [s.seconds for pack in packs for s in pack.segments if s.weight > 0]
    return ValidationRecord(
        step=step,
        stage=stage,
        loss=own.mean().item(),
        shuffled_loss=exchanged.mean().item() if prompts else None,
        loss_by_timestep={f"{t:g}": x for t, x in zip(timesteps, own.mean(0).tolist(), strict=True)},
        loss_by_duration=loss_by_duration(duration_sums(seconds, own.mean(1).tolist())),
        clips=len(total),
        seconds=time.perf_counter() - started,
    )


def shared_places(count: int, *, world: World) -> range:
    """This data-parallel rank's places of a list of `count`: equally many on all, the last perhaps beyond."""
    rounds = -(-count // world.dp_size)
    return range(world.dp_rank, world.dp_rank + rounds * world.dp_size, world.dp_size)


def exchanged_prompts(packs: Sequence[Pack]) -> dict[str, torch.Tensor]:
    """Key of each visit -> the prompt of another, however they are packed; empty where there is one only.

    Half of all visits, in the order of their keys, lie between the two: a clip's own captions are neighbours.
    """
    readable = (s for pack in packs for s in pack.segments if s.weight > 0)
    segments = sorted(readable, key=lambda segment: segment.key)
    half = len(segments) // 2
    if not half:
        return {}
    partners = segments[half:] + segments[:half]
    return {s.key: other.prompt_embeds for s, other in zip(segments, partners, strict=True)}


def _shown(segment: Segment, prompts: dict[str, torch.Tensor]) -> Segment:
    prompt = prompts.get(segment.key, segment.prompt_embeds)
    return replace(segment, prompt_embeds=prompt, frame_weights=None)
