"""The commit protocol: how a file becomes true, alone in this module.

    temp in the same folder -> fsync -> rename to the content-hash name -> fsync folder
    -> exclusive-create the commit record (link) -> fsync folder

A unit is done when, and only when, its commit record exists. `link` fails where the record is
already there, so the first writer wins and a second one learns of it. Nothing is ever deleted here
except a temp file of one's own. POSIX file systems with hard links.
"""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from schemas.errors import RunError

TEMP_PREFIX = ".tmp-"


def temp_path(folder: Path) -> Path:
    """A fresh temp name in `folder`, which is made if need be; nobody else uses it."""
    make_folder(folder)
    return folder / f"{TEMP_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"


def make_folder(folder: Path) -> None:
    """`mkdir -p` whose new entries survive a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (new names, renames) durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(temp: Path, final: Path) -> None:
    """Give a written and fsynced temp file its content-hash name; overwriting equal content is harmless."""
    os.rename(temp, final)
    sync_folder(final.parent)


def commit_once(path: Path, data: bytes | memoryview) -> bool:
    """Durably create `path` holding `data`; False where somebody else was first. Never overwrites."""
    temp = _write_temp(path.parent, data)
    try:
        os.link(temp, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise RunError(
                f"the file system of {path.parent} has no hard links, which commits need; "
                "choose an output folder on another file system"
            ) from error
        raise
    finally:
        os.unlink(temp)
    sync_folder(path.parent)
    return True


def replace(path: Path, data: bytes | memoryview) -> None:
    """Write a rebuildable file whole: readers see the old one or the new one."""
    temp = _write_temp(path.parent, data)
    os.replace(temp, path)
    sync_folder(path.parent)


def _write_temp(folder: Path, data: bytes | memoryview) -> Path:
    temp = temp_path(folder)
    try:
        with temp.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    return temp
