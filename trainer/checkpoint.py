"""Checkpoints that know when they are complete: training state in, `step-N/` out, and back.

    <output>/checkpoints/step-000020/   torch.distributed.checkpoint files and meta.json
    <output>/checkpoints/latest         the name of the newest one, for people

A checkpoint is written under a temporary name; meta.json, with the size of every file, comes last;
then everything is flushed and the folder renamed. Whatever a kill leaves behind is therefore not
complete and is passed over. Saved are weights and AdamW's moments and nothing else: learning rate,
noise and data position are functions of the step. Sharded tensors reload on any number of ranks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from schemas.errors import ConfigError
from trainer.parallel import World

FORMAT_VERSION = 1
_META = "meta.json"
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint on disk."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.meta["step"])


def checkpoints_folder(output: Path) -> Path:
    return output / "checkpoints"


def newest(folder: Path) -> Saved | None:
    """The complete checkpoint of the highest step in a checkpoints folder."""
    complete = all_complete(folder)
    return complete[-1] if complete else None


def all_complete(folder: Path) -> list[Saved]:
    """Complete checkpoints, oldest first."""
    found = [saved for path in folder.glob("step-*") if (saved := read_checkpoint(path))]
    return sorted(found, key=lambda saved: saved.step)


def read_checkpoint(path: Path) -> Saved | None:
    """The checkpoint in `path`, or None unless every file its meta.json lists has its full size."""
    try:
        meta = json.loads((path / _META).read_bytes())
        sizes = {name: (path / name).stat().st_size for name in meta["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Saved(path, meta) if sizes == meta["files"] else None


def find_checkpoint(path: Path) -> Saved:
    """From a checkpoint, a checkpoints folder or a run folder; ConfigError where none is complete."""
    saved = read_checkpoint(path) or newest(path) or newest(checkpoints_folder(path))
    if saved is None:
        raise ConfigError(
            f"{path}: expected a checkpoint (step-N), or a run folder with one in "
            f"{checkpoints_folder(path)}; found no complete one"
        )
    return saved


def save(
    output: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    meta: Mapping[str, Any],
    world: World,
    keep: int,
) -> Saved:
    """Write `step-N/` with all ranks, then forget all but the newest `keep`."""
    folder = checkpoints_folder(output)
    final = folder / f"step-{step:06d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    if world.is_main:
        _remove_leftovers(folder)
        temporary.mkdir(parents=True)
    world.barrier()
    # Flushes each rank's file to disk before it returns.
    save_state(
        {"model": model.state_dict(), "optim": optimizer_state(model, optimizer)}, checkpoint_id=temporary
    )
    world.barrier()
    if world.is_main:
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        record = {"format_version": FORMAT_VERSION, "step": step, **meta, "files": files}
        _write_durably(temporary / _META, json.dumps(record, indent=1) + "\n")
        _flush_folder(temporary)
        if final.exists():  # an incomplete one of the same step, or it would have been resumed from
            shutil.rmtree(final)
        temporary.rename(final)
        _flush_folder(folder)
        _write_durably(folder / f"{_TEMPORARY}latest", final.name + "\n")
        (folder / f"{_TEMPORARY}latest").rename(folder / "latest")
        for saved in all_complete(folder)[:-keep]:
            shutil.rmtree(saved.path)
    world.barrier()
    return find_checkpoint(final)


def load_model(saved: Saved, model: nn.Module) -> None:
    """Read weights into a sharded model, in place; strict, whatever the number of ranks."""
    load_state({"model": model.state_dict()}, checkpoint_id=saved.path)


def load_optimizer(saved: Saved, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read AdamW's moments of every trainable parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    load_state({"optim": optimizer_state(model, optimizer)}, checkpoint_id=saved.path)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Parameter name -> its tensors in the optimizer; no hyper-parameters, those are the config's."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def _remove_leftovers(folder: Path) -> None:
    """What a killed save left under a temporary name."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
