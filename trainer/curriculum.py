"""The curriculum as arithmetic: a step number in; stage, learning rate and clip windows out.

Everything is a pure function of step and config, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from schemas.bucket import Geometry
from schemas.config import LrConfig, StageConfig
from schemas.errors import ConfigError


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


def lr_at(step_in_stage: int, lr: LrConfig, *, steps: int) -> float:
    """Learning rate of a step: linear to `peak` over `warmup` steps, then cosine to 0 at `steps`, or flat.

    Warm-up is a factor on the whole curve, as in diffusers' and transformers' schedules, except that
    step 0 already moves: (step + 1) / warmup.
    """
    if step_in_stage < lr.warmup:
        return lr.peak * (step_in_stage + 1) / lr.warmup
    if lr.kind == "constant":
        return lr.peak
    done = (step_in_stage - lr.warmup) / max(1, steps - lr.warmup)
    return lr.peak * 0.5 * (1.0 + math.cos(math.pi * done))


def prefix_frames(pts_s: np.ndarray, offsets: np.ndarray, *, max_s: float, geometry: Geometry) -> np.ndarray:
    """int64 [n]: latent frames of the window `prefix` for n clips, at least 1 each.

    Clip i's frame times are pts_s[offsets[i]:offsets[i + 1]], in source seconds. A latent frame is in the
    window if the pixel frame it ends with lies within max_s of the first one, give or take half a frame
    (49 frames at 16 fps are a 3 s window although their times are rounded).
    """
    first, counts = offsets[:-1], np.diff(offsets)
    spacing = (pts_s[offsets[1:] - 1] - pts_s[first]) / np.maximum(counts - 1, 1)
    position = np.arange(len(pts_s)) - np.repeat(first, counts)
    elapsed = pts_s - np.repeat(pts_s[first], counts)
    inside = (elapsed <= np.repeat(max_s + spacing / 2, counts)) & geometry.ends_latent(position)
    return np.maximum(np.add.reduceat(inside, first, dtype=np.int64), 1)
