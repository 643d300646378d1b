"""Checkpoints that know when they are complete: `step-N/` in, training state out; written by `trainer.saver`.

    <output>/checkpoints/step-000020/   torch.distributed.checkpoint files and meta.json
    <output>/checkpoints/latest         the name of the newest one, for people

Complete is what has a meta.json, with every file it lists at its size; nothing else is resumed from, and that
only once its files are found to have their checksums, at the price of reading them twice.
Saved are weights and AdamW's moments and nothing else: learning rate, noise and data position are
functions of the step. Sharded tensors reload on any number of ranks, in any mesh.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state

from schemas.codec import checksum
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
"""What a meta.json must say; the rest is for people, but for the `checksums` of its files."""
_PIECE_BYTES, _THREADS = 32 << 20, 4
"""Of a file, see `file_checksum`: the first is part of the format."""


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


def file_checksum(path: Path) -> str:
    """That of the checksums of its pieces, which threads share: one alone reads 1 to 2 GB/s."""

    def of_piece(start: int) -> str:
        with path.open("rb") as file:
            file.seek(start)
            return checksum(file.read(_PIECE_BYTES))

    with ThreadPoolExecutor(_THREADS) as pool:
        pieces = pool.map(of_piece, range(0, path.stat().st_size, _PIECE_BYTES))
        return checksum("".join(pieces).encode())


def check_files(saved: Saved, *, alone: bool = False) -> None:
    """Hold the files of a checkpoint against their checksums; RunError where one is not as it was saved.

    All ranks together, each reading a share, or a process of its own: `alone`. The error is the same on all.
    """
    sums: dict[str, str] = saved.meta.get("checksums", {})
    # Those of rank 0, 1, ... 10: with as many ranks as then, what a rank is about to load anyway.
    names = sorted(sums, key=lambda name: (name.startswith("."), len(name), name))
    rank, ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    mine = [(name, lack) for name in names[rank::ranks] if (lack := _lack(saved.path / name, sums[name]))]
    of_ranks = [mine] * ranks
    if ranks > 1:
        dist.all_gather_object(of_ranks, mine)
    if found := [f"{name} {lack}" for part in of_ranks for name, lack in part]:
        raise RunError(
            f"{saved.path} is damaged: {', '.join(found)}; where it stays so, {_in_its_place(saved)}"
        )


def read_state(saved: Saved, state: dict[str, Any], *, alone: bool = False) -> None:
    """Fill the tensors of `state`, all ranks together or `alone`."""
    with _reading(saved):
        load_state(state, checkpoint_id=saved.path, no_dist=alone)


def read_metadata(saved: Saved) -> Metadata:
    """What a checkpoint's tensors are, and where."""
    with _reading(saved):
        return FileSystemReader(saved.path).read_metadata()


def load_model(saved: Saved, model: nn.Module) -> None:
    """Read weights into a sharded model, in place; strict, whatever the number of ranks."""
    read_state(saved, {"model": model.state_dict()})


def load_optimizer(saved: Saved, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read AdamW's moments of every trainable parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    read_state(saved, {"optim": optimizer_state(model, optimizer)})


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Parameter name -> its tensors in the optimizer; no hyper-parameters, those are the config's."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def causes(error: Exception | CheckpointException) -> str:
    """What went wrong, in a line: torch gathers the errors of all ranks, with their tracebacks.

    KeyboardInterrupt where one of them is that, which torch takes for an error.
    """
    failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
    if any(isinstance(each, KeyboardInterrupt) for each, _ in failures):
        raise KeyboardInterrupt from error
    lines = {f"{type(each).__name__}: {each}".removeprefix("OSError: ") for each, _ in failures}
    return "; ".join(sorted(lines))


@contextmanager
def _reading(saved: Saved) -> Iterator[None]:
    """RunError where torch cannot read what is there: a damaged pickle raises anything."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        raise RunError(
            f"{saved.path} cannot be read: {causes(error)}; try again, and where that is no better, "
            f"{_in_its_place(saved)}"
        ) from error


def _lack(path: Path, expected: str) -> str:
    """What is wrong with a file; empty where it is as it was saved."""
    try:
        return "" if file_checksum(path) == expected else "is not as it was saved"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _in_its_place(saved: Saved) -> str:
    older = [other.path.name for other in all_complete(saved.path.parent) if other.step < saved.step]
    rest = f" to go on from {older[-1]}" if older else "; there is no older one to go on from"
    return f"move it out of {saved.path.parent}{rest}"


def _step_folders(folder: Path) -> list[Path]:
    """Everything named step-N, by N."""
    numbers = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    return sorted((path for path, n in numbers.items() if n.isdecimal()), key=lambda path: int(numbers[path]))
