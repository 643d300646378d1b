"""What a checkpoint says about its run, and whether this run may continue it.

A resumed run must be the run it continues: another dataset, model or order of samples is refused field
by field. Learning rate, stages to come, mesh and intervals may change.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch

from schemas.card import Card
from schemas.config import TrainConfig
from schemas.errors import ConfigError, StaleDatasetError
from schemas.load import config_digest
from trainer.checkpoint import Saved, checkpoints_folder, newest
from trainer.loader import Loader
from trainer.objective import Schedule
from trainer.parallel import World
from trainer.weights import Architecture


def run_meta(
    config: TrainConfig, *, loader: Loader, architecture: Architecture, world: World
) -> dict[str, Any]:
    """The part of meta.json that is the same for all checkpoints of a run."""
    return {
        "config": config.model_dump(mode="json"),
        "config_digest": config_digest(config),
        "fingerprint": loader.card.fingerprint,
        "scaling": loader.card.scaling.model_dump(mode="json"),
        "plan_digest": loader.plan_digest(),
        "transformer": architecture.config,
        "schedule": asdict(architecture.schedule),
        "mesh": dict(zip(world.mesh.mesh_dim_names or (), world.mesh.shape, strict=True)),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def saved_architecture(saved: Saved) -> Architecture:
    """The transformer a checkpoint holds the weights of."""
    return Architecture(saved.meta["transformer"], Schedule(**saved.meta["schedule"]))


def resume_point(config: TrainConfig, card: Card) -> Saved | None:
    """The newest complete checkpoint of the run; an error naming what differs where it is another run's."""
    saved = newest(checkpoints_folder(Path(config.output)))
    if saved is None:
        return None
    if saved.meta["fingerprint"] != card.fingerprint:
        raise StaleDatasetError(
            f"{saved.path} was trained on another dataset: fingerprint {saved.meta['fingerprint'][:12]}, "
            f"{config.dataset} has {card.fingerprint[:12]}; give another --set output=FOLDER",
            {"fingerprint": (saved.meta["fingerprint"], card.fingerprint)},
        )
    stage = saved.meta["stage"]
    before = _identity(saved.meta["config"], stage)
    now = _identity(config.model_dump(mode="json"), stage)
    differences = [
        f"{name}: checkpoint {before.get(name)!r}, config {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if differences:
        raise ConfigError(
            f"{saved.path} belongs to a run with other settings: {'; '.join(differences)}; "
            "set these back, or give another --set output=FOLDER"
        )
    return saved


def _identity(config: dict[str, Any], stage: str) -> dict[str, Any]:
    """What makes a run that run: its model, what `stage` trains of it, what fixes the order of samples."""
    chosen = {f"model.{key}": value for key, value in config["model"].items() if key != "attention"}
    chosen |= {f"data.{key}": config["data"][key] for key in ("budget_tokens", "slots")}
    chosen |= {
        f"stages.{i}.trainable": one["trainable"]
        for i, one in enumerate(config["stages"])
        if one["name"] == stage
    }
    return chosen | {"seed": config["seed"], "loss.objective": config["loss"]["objective"]}
