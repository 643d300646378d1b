"""Export: a checkpoint in, a folder in the diffusers layout out, which the stock classes open strictly.

    <output>/config.json, diffusion_pytorch_model.safetensors     CogVideoXTransformer3DModel, or PackedDiT
    <output>/pytorch_lora_weights.safetensors                     adapters, for a pipeline's load_lora_weights
    <output>/scheduler/scheduler_config.json                      the noise schedule it was trained with
    <output>/latents.json                                         what it was trained on, and to attend to
                                                                  (`trainer.inputs`)

Runs in one plain process. Weights keep the type they were trained in (float32). Adapters go without the
matrices they stand beside where those are published ones, with them where they were trained too, and merged
when asked.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import save_file

from schemas.errors import ConfigError, RunError
from schemas.train_config import LossConfig
from trainer.attention import UNCALLED
from trainer.checkpoint import Saved, check_files, read_state
from trainer.inputs import INPUTS_NAME
from trainer.lineage import Shape, check_same, saved_lora, saved_shapes
from trainer.lora import ADAPTER, LORA_NAME, adapted_layers, add_adapters, lora_scale, merged_delta
from trainer.model import PackedCogVideoX, PackedModel, build_model
from trainer.objective import make_objective
from trainer.resume import saved_architecture

_PREFIX = "transformer."
"""Of names in a LoRA file: the part of the pipeline that they belong to."""
Values = dict[str, torch.Tensor]


def export(saved: Saved, output: Path, *, merge: bool = False) -> list[str]:
    """Write the weights of `saved` to a new folder; returns lines on what it is good for.

    `merge` adds adapters into the matrices they stand beside. ConfigError where the folder is none, or holds
    files already; RunError where the checkpoint is damaged.
    """
    output = output.resolve()  # "." has no name to put a temporary one beside
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; export to a new folder")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty; export to a new folder, or remove it first")
    architecture, lora = saved_architecture(saved), saved_lora(saved)
    if lora and not merge and architecture.kind == "dit":
        raise ConfigError(f"{saved.path} has adapters that no other program opens; export with --merge")
    check_files(saved, alone=True)
    objective = make_objective(LossConfig.model_validate(saved.meta["objective"]), architecture.schedule)
    values = _read(saved)
    adapters = {name: values.pop(name) for name in list(values) if ADAPTER.search(name)}
    scale = lora_scale(lora) if lora else 1.0
    notes = []
    if merge:
        for layer in adapted_layers(adapters):
            values[f"{layer}.weight"] += merged_delta(adapters, layer, scale=scale)
        adapters = {}
    base = published_base(saved.meta) if adapters else None
    if adapters:
        own = "beside the weights in this folder, which are nowhere else: random, trained, or merged into"
        beside = f"beside {base}" if base else own
        notes.append(f"{LORA_NAME}: adapters of rank {lora.rank if lora else 0}, {beside}")
    if architecture.local_frames:
        notes.append(
            f"trained on spans of {architecture.local_frames} latent frames, each with a copy of the prompt; "
            "stock diffusers attends over whole clips, which is another model"
        )
    if architecture.long_context != "none":
        notes.append("the long-context layers are in the file, but only this trainer knows them")
    temporary = output.with_name(f".tmp-{output.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if base is None:
            _write_model(_blank(saved), values, temporary)
        if adapters:
            save_file(_stock_adapters(adapters, scale=scale), temporary / LORA_NAME, {"format": "pt"})
        _write_json(temporary / "scheduler" / "scheduler_config.json", objective.scheduler_config())
        _write_json(temporary / INPUTS_NAME, saved.meta["inputs"] | {"attention": architecture.attention()})
        if output.is_dir():
            output.rmdir()
        temporary.rename(output)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{output} cannot be written: {error}") from error
    return notes


def published_base(meta: Mapping[str, Any]) -> str | None:
    """The `init`, with its revision, that a checkpoint's adapters stand beside; None where it is of no use
    alone: random weights, trained ones, or ones that adapters were merged into."""
    config = meta["config"]
    names = [stage["name"] for stage in config["stages"]]
    done = config["stages"][: names.index(meta["stage"]) + 1]
    start = max((i for i, stage in enumerate(done) if stage["init"]), default=0)
    init: str = done[start]["init"] or config["model"]["init"]
    revision = "" if done[start]["init"] else config["model"]["revision"]
    only = all(stage["lora"] == meta["lora"] and not stage["trainable"] for stage in done[start:])
    added = config["model"]["long_context"] != "none"
    if not only or added or init == "random":
        return None
    return f"{init} at revision {revision}" if revision else init


def _blank(saved: Saved) -> PackedModel:
    """The model of a checkpoint, without adapters, on the meta device."""
    with torch.device("meta"):
        return build_model(saved_architecture(saved), UNCALLED)


def _read(saved: Saved) -> Values:
    """All weights of a checkpoint, adapters too; ConfigError where meta.json describes others."""
    model = _blank(saved)
    if lora := saved_lora(saved):
        add_adapters(model, lora)
    shapes: dict[str, Shape] = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_same(shapes, saved_shapes(saved), where=str(saved.path))
    values = {name: torch.empty(shape) for name, shape in shapes.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as meant: one process
        read_state(saved, {"model": values}, alone=True)
    return values


def _stock_adapters(adapters: Values, *, scale: float) -> Values:
    """Under the names of diffusers' LoRA files; `scale` is in B, since not every reader takes an alpha."""
    return {
        _PREFIX + name: value * scale if ".lora_B." in name and scale != 1.0 else value
        for name, value in adapters.items()
    }


def _write_model(model: PackedModel, values: Values, folder: Path) -> None:
    model.load_state_dict(values, assign=True)
    if isinstance(model, PackedCogVideoX):
        model.__class__ = CogVideoXTransformer3DModel  # whose name goes into config.json
    model.save_pretrained(folder)


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
