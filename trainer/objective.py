"""The training objective: clean clips in; noisy clips and the targets of the prediction out.

A noisy clip is signal * clean + sigma * noise at a timestep. The three objectives differ in these two
factors and in what is predicted:

    v      signal**2 = a, sigma**2 = 1 - a    signal * noise - sigma * clean
    eps    the same, a not rescaled           noise
    flow   signal = 1 - s, sigma = s          noise - clean

a = alphas_cumprod[timestep] falls to exactly 0 for `v`; s = timestep / num_train_timesteps. diffusers' and
THUDM's CogVideoX scripts turn the predicted v into clean latents (`scheduler.get_velocity(output, noisy, t)`)
and weigh their squared error by 1 / (1 - a). With clean = signal * noisy - sigma * v that is exactly the
squared error of v, which is what is trained on here: it stays well conditioned where 1 - a is small.

T, C, H, W latents of one clip.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from schemas.errors import ConfigError
from schemas.model_weights import read_model_json
from schemas.train_config import LossConfig
from trainer.order import keyed_generator

ObjectiveName = Literal["v", "eps", "flow"]


@dataclass(frozen=True)
class Schedule:
    """Noise schedule under diffusers' names; the defaults are CogVideoX 5B's and 1.5's."""

    objective: ObjectiveName | None = None
    """What a model with this schedule predicts; None where that is not said."""
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift_scale: float = 1.0
    """3.0 for CogVideoX 2B."""
    shift: float = 1.0
    """`flow` only; the betas above are of the others."""

    def alphas_cumprod(self) -> torch.Tensor:
        """float64 [num_train_timesteps], falling; to exactly 0 except for `eps`.

        Betas linear in their root ("scaled_linear"), the SNR shift of SD3, then the rescaling to zero
        terminal SNR (https://arxiv.org/abs/2305.08891, algorithm 1).
        """
        start, end = self.beta_start**0.5, self.beta_end**0.5
        betas = torch.linspace(start, end, self.num_train_timesteps, dtype=torch.float64) ** 2
        alphas = torch.cumprod(1 - betas, dim=0)
        alphas = alphas / (self.snr_shift_scale + (1 - self.snr_shift_scale) * alphas)
        if self.objective == "eps":  # where no signal is left, predicted noise says nothing of the clip
            return alphas
        roots = alphas.sqrt()
        return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2

    def scheduler_config(self) -> dict[str, Any]:
        """The `scheduler_config.json` with which diffusers samples what was trained; `v` where not said."""
        if self.objective == "flow":
            return {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "num_train_timesteps": self.num_train_timesteps,
                "shift": self.shift,
            }
        named = {name: getattr(self, name) for name in _BETAS}
        return named | _FIXED | _SAYS[self.objective or "v"] | {"_class_name": "CogVideoXDDIMScheduler"}


_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "snr_shift_scale")
_FIXED = {
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
"""What every CogVideoX scheduler config says."""
_SAYS: dict[ObjectiveName, dict[str, Any]] = {
    "v": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "eps": {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
}
_UNKNOWN_TO_FLOW = (
    "use_dynamic_shifting",
    "invert_sigmas",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)
"""What a flow schedule may be set to beyond `Schedule`."""


def read_schedule(path: Path, *, key: str = "model.init") -> Schedule:
    """The schedule, and with it the objective, of a diffusers `scheduler_config.json`; ConfigError where
    none of the objectives has it. `key` is the setting that names its model, for messages."""
    given = read_model_json(path, key=key)
    config = _scheduler_defaults(given, path) | given
    if str(config["_class_name"]).startswith("FlowMatch"):
        wrong = [
            f"{name} = {config[name]!r}, expected it unset" for name in _UNKNOWN_TO_FLOW if config.get(name)
        ]
        objective: ObjectiveName = "flow"
        names: tuple[str, ...] = ("num_train_timesteps", "shift")
    else:
        objective = "eps" if config.get("prediction_type") == "epsilon" else "v"
        fixed = {"beta_schedule": _FIXED["beta_schedule"], "trained_betas": None, **_SAYS[objective]}
        wrong = [
            f"{name} = {config.get(name)!r}, expected {value!r}"
            for name, value in fixed.items()
            if config.get(name) != value
        ]
        names = _BETAS
    numbers = {name: config[name] for name in names if name in config}
    wrong += [
        f"{name} = {value!r}, expected a positive {'int' if name == 'num_train_timesteps' else 'float'}"
        for name, value in numbers.items()
        if not _positive(value, whole=name == "num_train_timesteps")
    ]
    if wrong:
        raise ConfigError(f"{path}: this schedule cannot be trained on: {'; '.join(wrong)}")
    return Schedule(objective, **numbers)


def _scheduler_defaults(given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What the class that a config names takes where the config says nothing: CogVideoX's shift by 3."""
    name = str(given.get("_class_name", ""))
    kind = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (inspect.isclass(kind) and issubclass(kind, SchedulerMixin)):
        raise ConfigError(
            f"{path}: _class_name = {name!r}: expected a scheduler of diffusers {diffusers.__version__}, as "
            "what the file leaves out is its default"
        )
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _positive(value: Any, *, whole: bool) -> bool:
    return type(value) in ((int,) if whole else (int, float)) and value > 0


def make_objective(loss: LossConfig, schedule: Schedule, *, key: str = "model.init") -> Objective:
    """The objective that `loss` asks for on a model's schedule; ConfigError where that says another one.

    `key` as in `read_schedule`.
    """
    if schedule.objective not in (None, loss.objective):
        raise ConfigError(
            f"loss.objective = {loss.objective!r}: the scheduler of {key} says {schedule.objective!r}; "
            f"set loss.objective = {schedule.objective!r}, or remove its scheduler_config.json for a model "
            "that is to learn another one"
        )
    if schedule.objective == "flow" and schedule.shift != loss.shift:
        raise ConfigError(
            f"loss.shift = {loss.shift:g}: the scheduler of {key} says {schedule.shift:g}; set "
            f"loss.shift = {schedule.shift:g}, or remove its scheduler_config.json to change it"
        )
    settled = replace(schedule, objective=loss.objective, shift=loss.shift)
    return Objective(loss.objective, settled, loss.timesteps)


@dataclass(frozen=True)
class Objective:
    """One of the three objectives on one schedule; make it with `make_objective`.

    Timesteps are integers below num_train_timesteps for `v` and `eps`, and any number from 0 to
    num_train_timesteps for `flow`: what the model is given.
    """

    name: ObjectiveName
    schedule: Schedule
    """With the objective in it: what a checkpoint keeps."""
    timesteps: Literal["uniform", "logit_normal"] = "uniform"

    def draw_timestep(self, key: str) -> float:
        """Fixed by the visit's key.

        `logit_normal` and the shift are those of Stable Diffusion 3 (https://arxiv.org/abs/2403.03206,
        sections 3.1 and 5.3.2).
        """
        generator = keyed_generator(key, "timestep")
        steps = self.schedule.num_train_timesteps
        if self.name != "flow":
            return int(torch.randint(steps, (), generator=generator))
        if self.timesteps == "uniform":
            share = float(torch.rand((), generator=generator))
        else:
            share = 1 / (1 + math.exp(-float(torch.randn((), generator=generator))))
        shift = self.schedule.shift
        return steps * shift * share / (1 + (shift - 1) * share)

    def timestep_at(self, share: float) -> float:
        """The timestep a `share` of the way, 0 to 1, from clean to noise."""
        steps = self.schedule.num_train_timesteps
        return steps * share if self.name == "flow" else round((steps - 1) * share)

    def noise(self, shape: Sequence[int], *, key: str) -> torch.Tensor:
        """Fixed by the visit's key."""
        return torch.randn(tuple(shape), generator=keyed_generator(key, "noise"))

    def noised(
        self, clean: torch.Tensor, *, key: str, timestep: float, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(noisy, target), shaped like `clean` [T, C, H, W]; `noise` is that of the visit's key."""
        noise = self.noise(clean.shape, key=key) if noise is None else noise
        if self.name == "flow":
            share = timestep / self.schedule.num_train_timesteps
            return (1 - share) * clean + share * noise, noise - clean
        signal, sigma = (table[int(timestep)] for table in self._tables)
        noisy = signal * clean + sigma * noise
        return noisy, noise if self.name == "eps" else signal * noise - sigma * clean

    def scheduler_config(self) -> dict[str, Any]:
        """As of `Schedule`."""
        return self.schedule.scheduler_config()

    @cached_property
    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and sigma by timestep, rounded once."""
        alphas = self.schedule.alphas_cumprod()
        return alphas.sqrt().float(), (1 - alphas).sqrt().float()
