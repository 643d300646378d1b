"""What a checkpoint says about its run, and whether this run may continue it.

A resumed run must be the run it continues: other data, another model, objective, order of samples or past
is refused field by field. Learning rate, stages to come, mesh and intervals may change, and are named.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from schemas.card import Card
from schemas.errors import ConfigError, RunError, StaleDatasetError
from schemas.load import config_digest, resolved_toml
from schemas.train_config import StageConfig, TrainConfig
from trainer.architecture import Architecture
from trainer.checkpoint import Saved, all_incomplete, checkpoints_folder, newest
from trainer.curriculum import total_steps
from trainer.inputs import inputs_of
from trainer.look import is_owed
from trainer.metrics import disk_errors, draw_missing


def run_meta(
    config: TrainConfig,
    stage: StageConfig,
    *,
    cards: Sequence[Card],
    plan_digest: str,
    architecture: Architecture,
    ranks: int,
) -> dict[str, Any]:
    """The part of meta.json that is the same for all checkpoints of a stage; cards as in `config.mixture`."""
    return {
        "stage": stage.name,
        "config": config.model_dump(mode="json"),
        "config_digest": config_digest(config),
        "fingerprints": [card.fingerprint for card in cards],
        "inputs": inputs_of(cards[0]),  # the others mean the same numbers, or they are not mixed
        "plan_digest": plan_digest,
        "architecture": architecture.record(),
        "objective": config.loss.model_dump(mode="json"),
        "lora": stage.lora.model_dump(mode="json") if stage.lora else None,
        "mesh": {"ranks": ranks, **(stage.mesh or config.mesh).model_dump()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def saved_architecture(saved: Saved) -> Architecture:
    """The transformer a checkpoint holds the weights of."""
    return Architecture.from_record(saved.meta["architecture"])


def resume_point(config: TrainConfig, cards: Sequence[Card]) -> Saved | None:
    """The newest complete checkpoint of the run; an error naming what differs where it is another run's.

    RunError where there are checkpoints but none is complete: starting anew would remove them.
    """
    folder = checkpoints_folder(Path(config.output))
    saved = newest(folder)
    if saved is None:
        if broken := all_incomplete(folder):
            lacks = "; ".join(f"{path.name}: {lack}" for path, lack in broken.items())
            raise RunError(
                f"no checkpoint in {folder} is complete ({lacks}); restore what is missing, or remove the "
                "folders to start anew"
            )
        return None
    before, now = saved.meta["fingerprints"], [card.fingerprint for card in cards]
    if before != now:
        short = [", ".join(name[:12] for name in names) for names in (before, now)]
        raise StaleDatasetError(
            f"{saved.path} was trained on other data: fingerprint {short[0]}, "
            f"{', '.join(dataset.path for dataset in config.mixture)} has {short[1]}; give another "
            "--set output=FOLDER",
            {"fingerprints": (before, now)},
        )
    fixed, _ = _changes(config, saved)
    if fixed:
        raise ConfigError(
            f"{saved.path} belongs to a run with other settings: "
            + "; ".join(f"{name}: checkpoint {old!r}, config {new!r}" for name, (old, new) in fixed.items())
            + "; set these back, or give another --set output=FOLDER"
        )
    return saved


def resume_notes(config: TrainConfig, saved: Saved, *, plan_digest: str) -> list[str]:
    """Lines on what is not as it was; `plan_digest` is that of the checkpoint's stage now."""
    lines = [f"resuming after step {saved.step} from {saved.path}"]
    for path, lack in all_incomplete(saved.path.parent).items():
        if int(path.name.removeprefix("step-")) > saved.step:
            lines.append(f"passed over {path}, which is newer but not complete: {lack}")
    lines += [f"{name}: {old!r} -> {new!r}" for name, (old, new) in _changes(config, saved)[1].items()]
    if saved.meta["plan_digest"] != plan_digest:
        lines.append(
            f"the samples of stage {saved.meta['stage']}, or how much of them it uses, have changed since: "
            "their order is a new one from here"
        )
    return lines


def keep_config(config: TrainConfig) -> None:
    """Write a config beside what it makes, whole or not at all."""
    path = Path(config.output) / "config.toml"
    temporary = path.with_name(".tmp-config.toml")
    with disk_errors(path):
        temporary.write_text(resolved_toml(config), encoding="utf-8")
        temporary.rename(path)


def is_finished(config: TrainConfig, saved: Saved) -> bool:
    """Whether all steps are done, and the look after the last one is taken."""
    return saved.step >= total_steps(config.stages) and not is_owed(config, saved.step)


def already_finished(config: TrainConfig, saved: Saved | None) -> bool:
    """Whether nothing is left to do; says so, and draws the loss curve if a kill came before it."""
    if saved is None or not is_finished(config, saved):
        return False
    draw_missing(Path(config.output), normalize=config.loss.normalize)
    print(
        f"nothing to do: step {saved.step}, the last, is done and in {saved.path}; raise stages.<n>.steps to "
        "train longer"
    )
    return True


Changes = dict[str, tuple[Any, Any]]
"""Dotted field -> (checkpoint, config)."""


def _changes(config: TrainConfig, saved: Saved) -> tuple[Changes, Changes]:
    """(changes that make it another run, changes it may go on with).

    The checkpoint knows only its global step, so stages that are over must stay as they were; the one
    it was saved in may become longer or shorter, but not end before the saved step. Later ones are free.
    """
    stages = saved.meta["config"]["stages"]
    current = [stage["name"] for stage in stages].index(saved.meta["stage"])
    done = saved.step - sum(stage["steps"] for stage in stages[:current])
    before, now = _flat(saved.meta["config"]), _flat(config.model_dump(mode="json"))
    steps = f"stages.{current}.steps"
    refused: Changes = {}
    noted: Changes = {}
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        number, _, field = name.removeprefix("stages.").partition(".")
        stage = int(number) if name.startswith("stages.") else None
        if old == new or name in _PLACES or (stage is not None and stage > current):
            continue
        if stage is None:
            free = bool(_FREE.fullmatch(name))
        elif stage < current:  # what it did is done
            if _FREE_IN_STAGE.fullmatch(field):
                continue
            free = False
        else:
            free = bool(_FREE_IN_STAGE.fullmatch(field)) or (
                name == steps and new is not None and new >= done
            )
        (noted if free else refused)[name] = old, new
    return refused, noted


_PLACES = ("dataset", "output")
"""Data is known by its fingerprint."""
_FREE = re.compile(
    r"(mesh|precision|optim|checkpoint)\..*"
    r"|validation\.(?!share$).*"
    r"|model\.(attention|recompute|compile)"
    r"|data\.(prefetch|readers|max_unreadable|cache|cache_gb)"
)
"""What may change in a run. The rest makes it that run: model, objective, order of samples."""
_FREE_IN_STAGE = re.compile(r"lr\..*|mesh(\..*)?")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted field -> value of a config's tree; stages are counted, datasets are their weights."""
    if name == "stages":
        value = dict(enumerate(value))
    if name == "datasets":
        value = [dataset["weight"] for dataset in value] or [1.0]
    if not isinstance(value, dict):
        return {name: value}
    parts = (_flat(part, f"{name}.{key}" if name else str(key)) for key, part in value.items())
    return {key: leaf for part in parts for key, leaf in part.items()}
