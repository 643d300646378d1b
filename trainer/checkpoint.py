"""Checkpoints that know when they are complete: training state in, `step-N/` out, and back.

    <output>/checkpoints/step-000020/   torch.distributed.checkpoint files and meta.json
    <output>/checkpoints/latest         the name of the newest one, for people

A checkpoint is written under a temporary name; meta.json, with the size of every file, comes last;
then everything is flushed and the folder renamed; an old one is renamed before it is removed. A kill
therefore leaves complete checkpoints and temporary names only. Saved are weights and AdamW's moments
and nothing else: learning rate, noise and data position are functions of the step. Sharded tensors
reload on any number of ranks.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from schemas.errors import ConfigError, RunError
from trainer.parallel import World

FORMAT_VERSION = 1
_META = "meta.json"
_KEYS = (
    "step",
    "files",
    "stage",
    "stopped",
    "config",
    "fingerprint",
    "plan_digest",
    "transformer",
    "schedule",
    "inputs",
)
"""What a meta.json must say; the rest is for people."""
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
    return [saved for path in _step_folders(folder) if isinstance(saved := examine(path), Saved)]


def all_incomplete(folder: Path) -> dict[Path, str]:
    """Folders named like a checkpoint and what each lacks, oldest first."""
    return {path: lack for path in _step_folders(folder) if isinstance(lack := examine(path), str)}


def examine(path: Path) -> Saved | str:
    """The checkpoint in `path`, or what it lacks; RunError where another version wrote it."""
    try:
        meta = json.loads((path / _META).read_bytes())
    except (OSError, ValueError) as error:
        return f"{_META} is missing" if isinstance(error, FileNotFoundError) else f"{_META} cannot be read"
    if not isinstance(meta, dict) or not isinstance(files := meta.get("files"), dict):
        return f"{_META} lists no files"
    if (found := meta.get("format_version")) != FORMAT_VERSION:
        raise RunError(
            f"{path}: expected format_version {FORMAT_VERSION}, found {found!r}; resume it with the version "
            "that wrote it, or give another --set output=FOLDER"
        )
    if missing := [key for key in _KEYS if key not in meta]:
        return f"{_META} has no {', '.join(missing)}"
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
    """Write `step-N/` with all ranks, then forget all but the newest `keep`.

    RunError on every rank where it cannot be written, as on a full disk.
    """
    folder = checkpoints_folder(output)
    final = folder / f"step-{step:06d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"

    def begin() -> None:
        with _disk_errors(final):
            _remove_leftovers(folder)
            temporary.mkdir(parents=True)

    def finish() -> Saved:
        with _disk_errors(final):
            files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
            record = {"format_version": FORMAT_VERSION, "step": step, **meta, "files": files}
            _write_durably(temporary / _META, json.dumps(record, indent=1) + "\n")
            _flush_folder(temporary)
            if final.exists():  # an incomplete one of the same step, or it would have been resumed from
                _remove(final)
            temporary.rename(final)
            _flush_folder(folder)
            _write_durably(folder / f"{_TEMPORARY}latest", final.name + "\n")
            (folder / f"{_TEMPORARY}latest").rename(folder / "latest")
            for saved in all_complete(folder)[:-keep]:
                _remove(saved.path)
        return find_checkpoint(final)

    world.on_main(begin)
    state = {"model": model.state_dict(), "optim": optimizer_state(model, optimizer)}
    with _disk_errors(final):
        save_state(state, checkpoint_id=temporary)  # flushes each rank's file to disk before it returns
    world.barrier()
    return world.on_main(finish)


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


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException) as error:
        failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
        why = "; ".join(sorted({str(cause) for cause, _ in failures}))
        raise RunError(
            f"{path} cannot be saved: {why}; what is saved stays: make room, and run again to resume"
        ) from error


def _remove(path: Path) -> None:
    """Renamed first, so that a kill leaves no part of it under its own name."""
    shutil.rmtree(path.rename(path.with_name(f"{_TEMPORARY}old-{path.name}")))


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
