"""A transformer in the layout of diffusers: a folder or a hub id in; its files, config and schedule out.

It may be the whole folder or the `transformer` of a pipeline, whose scheduler then tells the schedule. A
config is completed by its class's defaults, and read strictly: a key or a type that the class does not know
is refused, since diffusers would leave it out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import diffusers
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

from schemas.errors import ConfigError
from schemas.model_files import ModelFiles, find_model
from trainer.checkpoint import META_NAME, checkpoints_folder
from trainer.dit import PackedDiT
from trainer.lora import LORA_NAME
from trainer.objective import Schedule, read_schedule

Kind = Literal["cogvideox", "dit"]
CLASSES: dict[Kind, type[Any]] = {"cogvideox": CogVideoXTransformer3DModel, "dit": PackedDiT}
"""What a config.json describes; diffusers' own class reads and writes a CogVideoX."""
WEIGHTS = "diffusion_pytorch_model"
"""Name of weight files, without their ends."""
_SCHEDULER = "scheduler/scheduler_config.json"
_BESIDE = (_SCHEDULER, "vae/config.json", "text_encoder/config.json")
"""What tells more of a model, where it is part of a pipeline."""


def model_files(init: str, *, revision: str = "", key: str = "model.init") -> ModelFiles:
    """The files of a transformer, of its own or in a pipeline; fetched at need.

    `key` is the setting that names it, for messages. ConfigError where it is not to be had, is a run that was
    not exported, or holds adapters beside its weights: these would be left out.
    """
    _check_exported(init, key)
    files = find_model(
        init,
        subfolder="transformer",
        key=key,
        revision=revision,
        weights=WEIGHTS,
        beside=_BESIDE,
        has_all=lambda folder: folder.name != "transformer" or (folder.parent / _SCHEDULER).is_file(),
    )
    if (adapters := files.folder / LORA_NAME).is_file():
        raise ConfigError(
            f"{key}: {adapters} are adapters that belong to the weights beside them and would be left out; "
            "give a folder that was exported with --merge, or move that file away to do without them"
        )
    return files


def _check_exported(init: str, key: str) -> None:
    """ConfigError where it is the folder of a run, its checkpoints, or one of them."""
    folder = Path(init).expanduser()
    here = (folder / META_NAME, *folder.glob("step-*"), checkpoints_folder(folder))
    has_model = any((folder / name / "config.json").is_file() for name in ("", "transformer"))
    if not has_model and any(path.exists() for path in here):
        raise ConfigError(
            f"{key} = {init!r} holds checkpoints of a run, and they are no model yet: write one with "
            f"`latentpress export-model {init} OUT`, and --merge where adapters were trained; then set "
            f"{key} to OUT"
        )


def schedule_of(files: ModelFiles, *, key: str = "model.init") -> Schedule:
    """What a scheduler beside the transformer says, else that of its family."""
    for parent in (files.folder, files.folder.parent):
        if (path := parent / _SCHEDULER).is_file():
            return read_schedule(path, key=key)
    # The published models without rotary positions, the 2B family, are trained with the shifted schedule.
    rotary = files.config.get("use_rotary_positional_embeddings", True)
    return Schedule() if rotary else Schedule(snr_shift_scale=3.0)


def config_of(files: ModelFiles, kind: Kind, *, key: str = "model.init") -> dict[str, Any]:
    """All of a transformer's config; ConfigError where it is of another class than `kind`."""
    expected = CLASSES[kind].__name__
    if (found := files.config.get("_class_name", expected)) != expected:
        raise ConfigError(
            f"{key}: {files.folder} is of class {found}, model.kind = {kind!r} takes {expected}; "
            + ("set model.kind, or " if found in [known.__name__ for known in CLASSES.values()] else "")
            + "give a model of that class"
        )
    return complete(files.config, kind, key=key)


def complete(config: Mapping[str, Any], kind: Kind, *, key: str = "model.init") -> dict[str, Any]:
    """`config` with its class's defaults filled in, so that a checkpoint says all of it."""
    parameters = inspect.signature(CLASSES[kind].__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := sorted(given.keys() - defaults.keys()):
        raise ConfigError(
            f"{key}: config.json has keys that {CLASSES[kind].__name__} (diffusers {diffusers.__version__}) "
            f"does not know: {', '.join(unknown)}"
        )
    wrong = [
        f"{name} = {value!r}, expected one like {defaults[name]!r}"
        for name, value in given.items()
        if not _like(value, defaults[name])
    ]
    if wrong:
        raise ConfigError(f"{key}: config.json has values of other types: {'; '.join(wrong)}")
    return defaults | given


def _like(value: Any, default: Any) -> bool:
    """Whether a config's value has the type of diffusers' default; None stands for an optional integer."""
    if default is None:
        return value is None or type(value) is int
    return type(value) is type(default) or (type(default) is float and type(value) is int)
