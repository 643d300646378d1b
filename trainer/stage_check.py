"""All stages to come, looked at before the first step: a run's config and model in; what is refused out.

A stage may begin days after its run. What it names of the model, how its mesh cuts it and the weights it
starts from are held against the model now, on the meta device: all but the values and the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from schemas.errors import ConfigError
from schemas.train_config import TrainConfig
from trainer.architecture import Architecture, DataShape, architecture
from trainer.attention import Attention, sdpa, sdpa_cross
from trainer.lora import add_adapters
from trainer.model import PackedModel, build_model
from trainer.objective import make_objective
from trainer.optim import make_optimizer, set_trainable
from trainer.sharding import check_mesh
from trainer.weights import drawn_names


def run_architecture(config: TrainConfig, data: DataShape) -> Architecture:
    """The transformer of a run that starts anew.

    Where the first stage brings weights, theirs: `model.init` is then not asked for.
    """
    if config.stages[0].init in ("", "random"):
        return architecture(config.model, data)
    return _brought(config, 0, data)


def check_stages(config: TrainConfig, plan: Architecture, data: DataShape, *, step: int) -> None:
    """ConfigError naming the setting of a stage, of those that end after `step`, that does not fit `plan`.

    `plan` is the run's transformer, of a checkpoint or of `run_architecture`.
    """
    ends, moves, trains_context, new_context = 0, False, False, False
    for i, stage in enumerate(config.stages):
        begins, ends = ends, ends + stage.steps
        if ends <= step:
            continue
        model = _check_settings(config, i, plan)
        init = stage.init or ("" if i else config.model.init)
        if init and begins >= step:
            if i and init != "random":
                _check_same(config, plan, _brought(config, i, data), key=f"stages.{i}.init")
            key, revision = (f"stages.{i}.init", "") if stage.init else ("model.init", config.model.revision)
            drawn = drawn_names(init, model, revision=revision, key=key)
            new_context |= i == 0 and any(".long_context." in name for name in drawn)
        moves |= max(stage.lr.peak, *(group.peak for group in stage.lr.groups), 0.0) > 0
        trains_context |= any(
            parameter.requires_grad and ".long_context." in name
            for name, parameter in model.named_parameters()
        )
    if new_context and moves and not trains_context:
        raise ConfigError(
            f"model.long_context = {plan.long_context!r}: its layers are new, and no stage trains them; add "
            '"@long_context" to stages.<n>.trainable, or set model.long_context = "none"'
        )


def _check_settings(config: TrainConfig, i: int, plan: Architecture) -> PackedModel:
    """The model of stage `i` as it is trained, without memory; ConfigError where settings do not fit."""
    stage = config.stages[i]
    with torch.device("meta"), _under(f"stages.{i}."):
        model = build_model(plan, Attention("sdpa", "never called", sdpa, sdpa_cross))
        if stage.lora:
            add_adapters(model, stage.lora)
        set_trainable(model, stage)
        make_optimizer(model, config.optim, stage.lr)
    with _under(f"stages.{i}." if stage.mesh else ""):
        mesh = stage.mesh or config.mesh
        check_mesh(model, sp=mesh.sp, tp=mesh.tp)
    return model


@contextmanager
def _under(prefix: str) -> Iterator[None]:
    """Errors, which begin with a setting's name, name it from the root of the config."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def _brought(config: TrainConfig, i: int, data: DataShape) -> Architecture:
    """What the `init` of stage `i` names."""
    model = config.model.model_copy(update={"init": config.stages[i].init, "revision": ""})
    return architecture(model, data, key=f"stages.{i}.init")


def _check_same(config: TrainConfig, plan: Architecture, found: Architecture, *, key: str) -> None:
    wrong = _differences(plan.config, found.config)
    if found.schedule.objective:  # else it says nothing of its schedule, and learns the run's
        run, own = (make_objective(config.loss, each.schedule, key=key).schedule for each in (plan, found))
        wrong += _differences(asdict(run), asdict(own))
    if wrong:
        raise ConfigError(
            f"{key} brings another model than the run's, which has one for all stages: {'; '.join(wrong)}; "
            "run this stage alone, with --stage, or give weights of the same model"
        )


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: expected {expected.get(name)!r}, found {found.get(name)!r}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
