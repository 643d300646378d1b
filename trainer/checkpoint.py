"""Checkpoints that know when they are complete: `step-N/` in, training state out; written by `trainer.saver`.

    <output>/checkpoints/step-000020/   torch.distributed.checkpoint files and meta.json
    <output>/checkpoints/latest         the name of the newest one, for people

Complete is what has a meta.json, with every file it lists at its size; nothing else is resumed from.
Saved are weights and AdamW's moments and nothing else: learning rate, noise and data position are
functions of the step. Sharded tensors reload on any number of ranks, in any mesh.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as load_state

from schemas.errors import ConfigError, RunError

FORMAT_VERSION = 2
META_NAME = "meta.json"
KEYS = (
    "step",
    "files",
    "stage",
    "stopped",
    "config",
    "fingerprints",
    "plan_digest",
    "architecture",
    "objective",
    "lora",
    "inputs",
)
"""What a meta.json must say; the rest is for people."""


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
    return [saved for path in _step_folders(folder) if isinstance(saved := examine(path), Saved)]


def all_incomplete(folder: Path) -> dict[Path, str]:
    """Folders named like a checkpoint and what each lacks, oldest first."""
    return {path: lack for path in _step_folders(folder) if isinstance(lack := examine(path), str)}


def examine(path: Path) -> Saved | str:
    """The checkpoint in `path`, or what it lacks; RunError where another version wrote it."""
    try:
        meta = json.loads((path / META_NAME).read_bytes())
    except (OSError, ValueError) as error:
        return (
            f"{META_NAME} is missing"
            if isinstance(error, FileNotFoundError)
            else f"{META_NAME} cannot be read"
        )
    if not isinstance(meta, dict) or not isinstance(files := meta.get("files"), dict):
        return f"{META_NAME} lists no files"
    if (found := meta.get("format_version")) != FORMAT_VERSION:
        raise RunError(
            f"{path}: expected format_version {FORMAT_VERSION}, found {found!r}; resume it with the version "
            "that wrote it, or give another --set output=FOLDER"
        )
    if missing := [key for key in KEYS if key not in meta]:
        return f"{META_NAME} has no {', '.join(missing)}"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if (found := file.stat().st_size) != size:
            return f"{name} has {found} of {size} bytes"
    return Saved(path, meta)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold a run folder: one run at a time, since a save removes what it takes for leftovers."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"output = {str(output)!r}: expected a folder that can be written to: {error.strerror}"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another run is training into {output}; wait for it, or give another --set output=FOLDER"
            ) from None
        yield


def find_checkpoint(path: Path) -> Saved:
    """From a checkpoint, a checkpoints folder or a run folder; ConfigError where none is complete."""
    here = examine(path)
    saved = here if isinstance(here, Saved) else newest(path) or newest(checkpoints_folder(path))
    if saved is None:
        raise ConfigError(
            f"{path}: expected a checkpoint (step-N), or a run folder with one in "
            f"{checkpoints_folder(path)}; found no complete one"
        )
    return saved


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


def _step_folders(folder: Path) -> list[Path]:
    """Everything named step-N, by N."""
    numbers = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    return sorted((path for path, n in numbers.items() if n.isdecimal()), key=lambda path: int(numbers[path]))
