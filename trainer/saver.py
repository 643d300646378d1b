"""Writing checkpoints, beside training: a step's state in, a complete `step-N/` out.

A checkpoint is written under a temporary name, each rank reading its files back for their checksums;
meta.json, with the size and checksum of every file, comes last; then everything is flushed and the folder
renamed; an old one is renamed before it is removed. A kill therefore leaves complete checkpoints and
temporary names only. In the background the step waits for a copy to host memory alone, at the price of that
memory; ranks then agree over a process group of their own, and a checkpoint is complete as soon as its last
byte is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_now
from torch.distributed.checkpoint.storage import WriteResult

from schemas.errors import RunError
from trainer.checkpoint import (
    FORMAT_VERSION,
    META_NAME,
    Saved,
    all_complete,
    causes,
    checkpoints_folder,
    file_checksum,
    find_checkpoint,
    optimizer_state,
)
from trainer.parallel import World

TEMPORARY = ".tmp-"


class Saver:
    """The checkpoints of one run, written one at a time by all ranks; they are whole when it is left.

    Every method is called by all ranks together, and raises RunError on all of them where a checkpoint
    cannot be written, as on a full disk; one that fails in the background does so at the next call.
    """

    def __init__(self, output: Path, *, world: World, keep: int, background: bool) -> None:
        """Removes what a killed run left behind; call it with the output locked."""
        self._folder = checkpoints_folder(output)
        self._world = world
        self._keep = keep
        self._background = background
        # Not the group of the gradients: two threads must not interleave their collectives on one. A slow
        # disk is no failure, so it waits long.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        cuda = world.device.type == "cuda"
        self._staging = StagingOptions(
            use_pinned_memory=cuda,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=cuda,
        )
        self._stager = DefaultStager(self._staging)
        self._last: Path | None = None
        self._writing: Future[Metadata] | None = None
        world.on_main(self._remove_leftovers)

    def save(
        self, step: int, *, model: nn.Module, optimizer: torch.optim.Optimizer, meta: Mapping[str, Any]
    ) -> None:
        """Save the state after `step` once the save before is done; then forget all but the newest `keep`."""
        self._settle()
        final = self._folder / f"step-{step:06d}"
        writer = _Writer(
            final, meta={"format_version": FORMAT_VERSION, "step": step, **meta}, keep=self._keep
        )
        state = {"model": model.state_dict(), "optim": optimizer_state(model, optimizer)}
        self._last = final
        with _disk_errors(final):
            if self._background:
                if torch.__version__ < "2.13":  # before, a stager is closed by its first use
                    self._stager = DefaultStager(self._staging)
                writing = async_save(
                    state, storage_writer=writer, process_group=self._group, async_stager=self._stager
                )
                assert isinstance(writing, Future)  # as staging is over when it returns
                self._writing = writing
            else:
                save_now(state, storage_writer=writer, process_group=self._group)

    def wait(self) -> Saved:
        """The last checkpoint saved, complete."""
        self._settle()
        last = self._last
        assert last is not None, "wait() follows a save()"
        return self._world.on_main(lambda: find_checkpoint(last))

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._settle()
        except RunError:
            if kind is None:  # else the run has already failed for a reason of its own
                raise
        finally:
            self._stager.close()

    def _settle(self) -> None:
        """Wait for the save under way; an interrupt ends the wait, not the save."""
        writing, last = self._writing, self._last
        if writing is not None and last is not None:
            try:
                with _disk_errors(last):
                    writing.result()
            finally:
                if writing.done():
                    self._writing = None

    def _remove_leftovers(self) -> None:
        """What a killed save left under a temporary name."""
        with _disk_errors(self._folder):
            for path in self._folder.glob(f"{TEMPORARY}*"):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


@dataclass(frozen=True)
class _Written(WriteResult):
    """As torch gathers them on one rank, with the checksum of the file it is in."""

    checksum: str


class _Writer(FileSystemWriter):
    """Writes under a temporary name and makes the checkpoint complete, as the last act of the save.

    `finish` runs on one rank when the files of all are on disk; torch hands its error to every rank.
    """

    def __init__(self, final: Path, *, meta: dict[str, Any], keep: int) -> None:
        self._temporary = final.with_name(f"{TEMPORARY}{final.name}")
        super().__init__(self._temporary)
        self._final = final
        self._meta = meta
        self._keep = keep

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        sums = {name: file_checksum(self._temporary / name) for name in names}
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result(
            [_Written(**vars(each), checksum=sums[each.storage_data.relative_path]) for each in results]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        folder, temporary, final = self._final.parent, self._temporary, self._final
        paths = sorted(temporary.iterdir())
        written = (each for part in results for each in part if isinstance(each, _Written))
        sums = {each.storage_data.relative_path: each.checksum for each in written}
        meta = {
            **self._meta,
            "files": {path.name: path.stat().st_size for path in paths},
            "checksums": {path.name: sums.get(path.name) or file_checksum(path) for path in paths},
        }
        _write_durably(temporary / META_NAME, json.dumps(meta, indent=1) + "\n")
        _flush_folder(temporary)
        if final.exists():  # an incomplete one of the same step, or it would have been resumed from
            _remove(final)
        temporary.rename(final)
        _flush_folder(folder)
        _write_durably(folder / f"{TEMPORARY}latest", final.name + "\n")
        (folder / f"{TEMPORARY}latest").rename(folder / "latest")
        for saved in all_complete(folder)[: -self._keep]:
            _remove(saved.path)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException) as error:
        raise RunError(
            f"{path} cannot be saved: {causes(error)}; what is saved stays: make room, and run again to "
            "resume"
        ) from error


def _remove(path: Path) -> None:
    """Renamed first, so that a kill leaves no part of it under its own name."""
    shutil.rmtree(path.rename(path.with_name(f"{TEMPORARY}old-{path.name}")))


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
