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
from trainer.attention import UNCALLED
from trainer.curriculum import Source, first_weights
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
    source = first_weights(config, 0)
    assert source is not None
    # A stage's own "random" says how weights begin, and `model` alone of which transformer.
    return architecture(config.model, data) if source.init == "random" else _brought(config, source, data)


def check_stages(config: TrainConfig, transformer: Architecture, data: DataShape, *, step: int) -> None:
    """ConfigError naming the setting of a stage that does not fit the run's `transformer`.

    Of the stages that end after `step`; the transformer is that of a checkpoint or of `run_architecture`.
    """
    ends, moves, trains_context, new_context = 0, False, False, False
    for i, stage in enumerate(config.stages):
        begins, ends = ends, ends + stage.steps
        if ends <= step:
            continue
        model = _check_settings(config, i, transformer)
        source = first_weights(config, i)
        if source is not None and begins >= step:
            if i and source.init != "random":
                _check_same(config, transformer, _brought(config, source, data), key=source.key)
            drawn = drawn_names(source.init, model, revision=source.revision, key=source.key)
            new_context |= i == 0 and any(".long_context." in name for name in drawn)
        moves |= max(stage.lr.peak, *(group.peak for group in stage.lr.groups), 0.0) > 0
        trains_context |= any(
            parameter.requires_grad and ".long_context." in name
            for name, parameter in model.named_parameters()
        )
    if new_context and moves and not trains_context:
        raise ConfigError(
            f"model.long_context = {transformer.long_context!r}: its layers are new, and no stage trains "
            'them; add "@long_context" to stages.<n>.trainable, or set model.long_context = "none"'
        )


def _check_settings(config: TrainConfig, i: int, transformer: Architecture) -> PackedModel:
    """The model of stage `i` as it is trained, without memory; ConfigError where settings do not fit."""
    stage = config.stages[i]
    with torch.device("meta"), _under(f"stages.{i}."):
        model = build_model(transformer, UNCALLED)
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


def _brought(config: TrainConfig, source: Source, data: DataShape) -> Architecture:
    """The transformer that weights belong to."""
    model = config.model.model_copy(update={"init": source.init, "revision": source.revision})
    return architecture(model, data, key=source.key)


def _check_same(config: TrainConfig, transformer: Architecture, found: Architecture, *, key: str) -> None:
    wrong = _differences(transformer.config, found.config)
    if found.schedule.objective:  # else it says nothing of its schedule, and learns the run's
        schedules = [each.schedule for each in (transformer, found)]
        run, own = (asdict(make_objective(config.loss, each, key=key).schedule) for each in schedules)
        wrong += _differences(run, own)
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
