"""The training objective: clean clips in; noisy clips, targets and a loss out.

CogVideoX predicts v = sqrt(a) * noise - sqrt(1 - a) * clean on a schedule whose last step is pure noise.
diffusers' and THUDM's training scripts turn the prediction into clean latents (`scheduler.get_velocity(
output, noisy, t)`) and weigh their squared error by 1 / (1 - a). With clean = sqrt(a) * noisy -
sqrt(1 - a) * v that is exactly the squared error of v, which is what is computed here: one subtraction
that stays well conditioned where 1 - a is small, and no weight that could overflow.

T, C, H, W latents of one clip; V video tokens, P channels of a patch; a = alphas_cumprod[timestep].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from schemas.errors import ConfigError
from trainer.order import keyed_generator


@dataclass(frozen=True)
class Schedule:
    """Noise schedule under diffusers' names; the defaults are CogVideoX 5B's and 1.5's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift_scale: float = 1.0
    """3.0 for CogVideoX 2B."""

    def alphas_cumprod(self) -> torch.Tensor:
        """float64 [num_train_timesteps], falling to exactly 0.

        Betas linear in their root ("scaled_linear"), the SNR shift of SD3, then the rescaling to zero
        terminal SNR (https://arxiv.org/abs/2305.08891, algorithm 1).
        """
        start, end = self.beta_start**0.5, self.beta_end**0.5
        betas = torch.linspace(start, end, self.num_train_timesteps, dtype=torch.float64) ** 2
        alphas = torch.cumprod(1 - betas, dim=0)
        roots = (alphas / (self.snr_shift_scale + (1 - self.snr_shift_scale) * alphas)).sqrt()
        return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2

    def scheduler_config(self) -> dict[str, Any]:
        """The `scheduler_config.json` with which the stock pipeline samples what was trained."""
        return asdict(self) | _FIXED | {"_class_name": "CogVideoXDDIMScheduler"}


_FIXED = {
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
"""What every CogVideoX scheduler config says."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder; ConfigError where there is none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.init: {path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"model.init: {path} holds no JSON object")
    return tree


def read_schedule(path: Path) -> Schedule:
    """The schedule of a diffusers `scheduler_config.json`; ConfigError where the objective differs."""
    config = read_json(path)
    wrong = [
        f"{name} = {config.get(name)!r}, expected {_FIXED[name]!r}"
        for name in ("beta_schedule", "prediction_type", "rescale_betas_zero_snr")
        if config.get(name) != _FIXED[name]
    ]
    defaults = asdict(Schedule())
    wrong += [
        f"{name} = {config[name]!r}, expected a positive {type(default).__name__}"
        for name, default in defaults.items()
        if name in config and not _positive(config[name], whole=isinstance(default, int))
    ]
    if wrong:
        raise ConfigError(
            f"{path}: this schedule cannot be trained with loss.objective = 'v': {'; '.join(wrong)}"
        )
    return Schedule(**{name: config[name] for name in defaults if name in config})


def _positive(value: Any, *, whole: bool) -> bool:
    return type(value) in ((int,) if whole else (int, float)) and value > 0


class VObjective:
    """CogVideoX's velocity objective on one schedule."""

    def __init__(self, schedule: Schedule) -> None:
        alphas = schedule.alphas_cumprod()
        self._signal = alphas.sqrt().float()
        self._noise = (1 - alphas).sqrt().float()

    def draw_timestep(self, key: str) -> int:
        """Uniform over the schedule, fixed by the visit's key."""
        generator = keyed_generator(key, "timestep")
        return int(torch.randint(len(self._signal), (), generator=generator))

    def noised(self, clean: torch.Tensor, *, key: str, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(noisy, target), shaped like `clean`; the noise is fixed by the visit's key."""
        noise = torch.randn(clean.shape, generator=keyed_generator(key, "noise"))
        signal, sigma = self._signal[timestep], self._noise[timestep]
        return signal * clean + sigma * noise, signal * noise - sigma * clean


def clip_errors(prediction: torch.Tensor, target: torch.Tensor, *, lengths: Sequence[int]) -> torch.Tensor:
    """Mean squared error of each clip, [B] float32; both inputs are [V, P], clip after clip of `lengths`."""
    errors = (prediction.float() - target).square().mean(dim=1)
    return torch.stack([clip.mean() for clip in torch.split(errors, list(lengths))])


def clip_weights(
    lengths: Sequence[int],
    *,
    normalize: Literal["per_clip", "per_token"],
    step_clips: int,
    step_tokens: int,
) -> torch.Tensor:
    """[B] weights that sum to 1 over all clips of the step, on every rank and in every pack.

    The denominators are those of the whole step, known from the plan, so that neither packing nor the
    number of ranks changes a gradient.
    """
    if normalize == "per_clip":
        return torch.full((len(lengths),), 1 / step_clips)
    return torch.tensor(lengths, dtype=torch.float32) / step_tokens
