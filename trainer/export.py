"""Export: a checkpoint in, a folder in the diffusers layout out, which the stock classes open strictly.

    <output>/config.json, diffusion_pytorch_model.safetensors     CogVideoXTransformer3DModel
    <output>/scheduler/scheduler_config.json                      the noise schedule it was trained with
    <output>/latents.json                                         what it was trained on (`trainer.inputs`)

Runs in one plain process. Weights keep the type they were trained in (float32).
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict_loader import load as load_state

from schemas.errors import ConfigError, RunError
from trainer.checkpoint import Saved
from trainer.inputs import INPUTS_NAME
from trainer.resume import saved_architecture


def export(saved: Saved, output: Path) -> None:
    """Write the weights of `saved` to a new folder; ConfigError where it is none, or holds files already."""
    output = output.resolve()  # "." has no name to put a temporary one beside
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; export to a new folder")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty; export to a new folder, or remove it first")
    architecture = saved_architecture(saved)
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**architecture.config)
    weights = {name: torch.empty(tensor.shape) for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as meant: one process
        load_state({"model": weights}, checkpoint_id=saved.path, no_dist=True)
    model.load_state_dict(weights, assign=True)
    temporary = output.with_name(f".tmp-{output.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        scheduler = temporary / "scheduler" / "scheduler_config.json"
        scheduler.parent.mkdir()
        scheduler.write_text(
            json.dumps(architecture.schedule.scheduler_config(), indent=2) + "\n", encoding="utf-8"
        )
        (temporary / INPUTS_NAME).write_text(
            json.dumps(saved.meta["inputs"], indent=2) + "\n", encoding="utf-8"
        )
        if output.is_dir():
            output.rmdir()
        temporary.rename(output)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{output} cannot be written: {error}") from error
