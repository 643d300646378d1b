"""Looking at what is trained: a model between two steps in; a validation record and pictures of samples out.

A run looks at the end of each stage, and at intervals. The record is written last, so a look without one was
not taken to its end and is owed: a run that is resumed takes it before its next step. The trade-off: training
waits; a stop signal does not end a look, which is why a checkpoint is saved before each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from schemas.train_config import TrainConfig
from trainer.curriculum import stage_at
from trainer.loader import Loader
from trainer.metrics import Metrics, read_records
from trainer.model import PackedModel
from trainer.objective import Objective
from trainer.parallel import World
from trainer.sample import Pictures, Sample, draw_samples
from trainer.sharding import predict
from trainer.validate import ValidationRecord, validate


def is_due(config: TrainConfig, step: int) -> bool:
    """Whether a run looks at its model after `step` steps."""
    settings = config.validation
    if step == 0 or not (settings.share or settings.samples):
        return False
    stage, before = stage_at(step - 1, config.stages)
    return before + 1 == stage.steps or bool(settings.every and step % settings.every == 0)


def is_owed(config: TrainConfig, step: int) -> bool:
    """Whether a run that has saved after `step` steps was stopped or killed before the look that was due."""
    taken = read_records(Path(config.output) / "metrics.jsonl", kind=ValidationRecord.kind)
    return is_due(config, step) and all(record["step"] != step for record in taken)


@dataclass(frozen=True)
class Looks:
    """How a run looks at its model."""

    config: TrainConfig
    loader: Loader
    objective: Objective
    metrics: Metrics | None
    """On rank 0."""
    pictures: Pictures | None
    """Shows samples; without it none are drawn."""
    guidance_prompt: torch.Tensor | None
    """The empty prompt [S, D], where samples need it."""

    def due(self, step: int) -> bool:
        """As `is_due`."""
        return is_due(self.config, step)

    def take(self, model: PackedModel, *, step: int, stage: str, world: World) -> None:
        """Validate, and draw samples; all ranks together."""
        settings, loader = self.config.validation, self.loader
        run = partial(predict, model, world=world)
        record = validate(
            run,
            loader.held_out(stage, settings.clips),
            reader=loader,
            step=step,
            stage=stage,
            timesteps=settings.timesteps,
            objective=self.objective,
            layout=model.layout,
            world=world,
        )
        world.say(str(record))
        if settings.samples and (pictures := self.pictures):
            clips = [read for pack in loader.held_out(stage, settings.samples) for read in pack]
            drawn = draw_samples(
                run,
                clips,
                reader=loader,
                config=settings,
                empty_prompt=self.guidance_prompt,
                objective=self.objective,
                layout=model.layout,
                world=world,
            )
            folder = Path(self.config.output) / "samples" / f"step-{step:06d}"

            def shown() -> str:
                references = loader.read(clips).segments
                samples = [Sample(*pair) for pair in zip(references, drawn, strict=True) if pair[0].weight]
                return show(pictures, folder, samples)

            world.say(world.on_main(shown))
        if self.metrics:
            self.metrics.add(record)


def show(pictures: Pictures, folder: Path, samples: Sequence[Sample]) -> str:
    """Write the pictures; a line on where they are, or on why there are none.

    Whatever goes wrong is no reason to stop training, and a rank that fails alone would let the others wait.
    """
    try:
        pictures.write(folder, samples)
    except Exception as error:
        return f"note: no pictures in {folder}: {type(error).__name__}: {error}"
    return f"samples: {folder}"
