"""The curriculum as arithmetic: a step number in; stage, first weights and learning rate out.

Everything is a pure function of step and config, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from schemas.errors import ConfigError
from schemas.train_config import DataConfig, LrConfig, LrGroupConfig, StageConfig, TrainConfig


def total_steps(stages: Sequence[StageConfig]) -> int:
    """Optimizer steps of the whole run."""
    return sum(stage.steps for stage in stages)


def stage_at(step: int, stages: Sequence[StageConfig]) -> tuple[StageConfig, int]:
    """The stage that global `step` belongs to, and the step counted inside it (both from 0)."""
    rest = step
    for stage in stages:
        if 0 <= rest < stage.steps:
            return stage, rest
        rest -= stage.steps
    last = total_steps(stages) - 1
    raise ConfigError(
        f"{step = } is outside this run: its {len(stages)} stages have steps 0 to {last}; "
        "raise stages.<n>.steps or add a stage to train longer"
    )


@dataclass(frozen=True)
class Source:
    """Weights to start from, as settings name them."""

    init: str
    revision: str
    """Both as in `ModelConfig`."""
    key: str
    """The setting that names them, for messages."""


def first_weights(config: TrainConfig, number: int) -> Source | None:
    """What stage `number` (from 0) starts from; None where that is what the stage before ends with.

    The first stage always has some: its own, else `model.init`. `model.revision` is of `model.init` alone.
    """
    if init := config.stages[number].init:
        return Source(init, revision="", key=f"stages.{number}.init")
    return None if number else Source(config.model.init, config.model.revision, key="model.init")


def slots_of(stage: StageConfig, data: DataConfig) -> int:
    """Packs of each of a stage's steps, over all ranks."""
    return stage.slots or data.slots


def budget_of(stage: StageConfig, data: DataConfig) -> int:
    """Tokens that each of a stage's packs has room for."""
    return stage.budget_tokens or data.budget_tokens


def lr_at(step_in_stage: int, lr: LrConfig, *, steps: int, group: LrGroupConfig | None = None) -> float:
    """Learning rate of a step: linear to `peak` over `warmup` steps, then cosine to `end`, or flat.

    Warm-up is a factor on the whole curve, as in diffusers' and transformers' schedules, except that
    step 0 already moves: (step + 1) / warmup. A `group` has its own curve under the stage's warm-up.
    """
    curve = group or lr
    if step_in_stage < lr.warmup:
        return curve.peak * (step_in_stage + 1) / lr.warmup
    if curve.kind == "constant":
        return curve.peak
    done = (step_in_stage - lr.warmup) / max(1, steps - lr.warmup)
    return curve.end + (curve.peak - curve.end) * 0.5 * (1.0 + math.cos(math.pi * done))
