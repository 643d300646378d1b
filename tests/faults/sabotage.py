"""Broken protocols, to see that the harness finds what is wrong with each.

Every function takes the tapped folder and is called in a driver once the taps are in place: what it puts
there goes through them.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any


def no_file_sync(folder: Path) -> None:
    """Bytes are left to the page cache."""
    _sync_only(folders=True)


def no_folder_sync(folder: Path) -> None:
    """Names are left to the page cache."""
    _sync_only(folders=False)


def _sync_only(*, folders: bool) -> None:
    plain = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) == folders:
            plain(fd)

    os.fsync = fsync  # type: ignore[assignment]


def record_in_place(folder: Path) -> None:
    """A record is written under its final name, not linked there."""

    def link(source: Any, target: Any) -> None:
        with open(target, "xb", buffering=0) as file:
            data = Path(source).read_bytes()
            file.write(data[: len(data) // 2])
            file.write(data[len(data) // 2 :])
            os.fsync(file.fileno())

    os.link = link  # type: ignore[assignment]


def record_first(folder: Path) -> None:
    """A shard gets its name only after its record was made."""
    rename, link = os.rename, os.link
    late: list[tuple[Any, Any]] = []

    def rename_later(source: Any, target: Any) -> None:
        if str(target).endswith(".tar"):
            late.append((source, target))
        else:
            rename(source, target)

    def link_and_rename(source: Any, target: Any) -> None:
        link(source, target)
        while late:
            rename(*late.pop())

    os.rename, os.link = rename_later, link_and_rename  # type: ignore[assignment]


def last_writer_wins(folder: Path) -> None:
    """A record that is there already is overwritten."""
    rename = os.rename

    def link(source: Any, target: Any) -> None:
        copy = f"{source}-copy"
        Path(copy).write_bytes(Path(source).read_bytes())
        rename(copy, target)

    os.link = link  # type: ignore[assignment]


def tidies_up(folder: Path) -> None:
    """A run that begins by removing temp files, which may be another's that still writes."""
    for path in folder.rglob(".tmp-*"):
        path.unlink()
