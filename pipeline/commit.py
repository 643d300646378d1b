"""The commit protocol: how a file becomes true, alone in this module.

    temp in the same folder -> fsync -> rename to the content-hash name -> fsync folder
    -> exclusive-create the commit record (link) -> fsync folder

A unit is done when, and only when, its commit record exists. The first writer of a record wins, a
second one learns of it. Nothing is ever deleted here except a temp file of one's own. `open_store`
finds out at the start of a run which of three ways a store offers, and refuses one that offers none:

- link: POSIX file systems. `link` fails where the record is already there.
- put: S3 and compatible stores. Shards are written to a local temp file, uploaded, and their size and
  checksum held against it; records are put on condition that there is none (`If-None-Match: *`).
- coordinator: file systems without hard links (some network and FUSE ones, FAT). One driver holds the
  lock of the dataset and records what workers hand it; two at once are refused, not raced.

The durable steps, each of which may be the last one that a process does:

    make_folder   mkdir, fsync of the parent                   (each level, once for a process)
    ShardWriter   create temp, write, fsync                    (shard; locally or in $TMPDIR)
    publish       rename temp -> hash name, fsync folder       | put: upload, look at it, unlink temp
    commit_once   create temp, write, fsync,
                  link temp -> record, unlink temp, fsync folder
                                                               | put: conditional put
                                                               | coordinator: rename instead of link
    replace       create temp, write, fsync, rename over, fsync folder  | put: put
    open_store    fsync of the folders of records,
                  create probe, link, link, unlink, unlink     | put: put, put, delete
                                                               | coordinator: mkdir, write, fsync, rename

A name that is there is not yet one that stays: whoever made it may have been killed before its fsync. So
what a process builds on it syncs itself, folders (`make_folder`) as well as records (`open_store`,
`commit_once`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pipeline import object_store
from pipeline.coordinator import LOCK_NAME, coordinator_lock
from schemas.errors import ConfigError, RunError
from schemas.store import is_remote

Committing = Literal["link", "put", "coordinator"]

TEMP_PREFIX = ".tmp-"
LOCAL_TEMP_PREFIX = "latentpress-tmp-"
"""Of files in $TMPDIR on their way to an object store; the process number follows."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_MAY_MEND = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
_lasting: set[tuple[Path, int, int]] = set()
"""Folders, with device and inode, that this process knows to survive a power cut."""
_coordinated: set[Path] = set()
"""Roots whose coordinator lock this process holds."""
_recording = threading.Lock()


def is_scaffold(name: str) -> bool:
    """Whether a name beside a dataset's files is that of a temp file, a lock, or a file system's own."""
    return name.startswith(TEMP_PREFIX) or name in (LOCK_NAME, "lost+found")


@contextlib.contextmanager
def open_store(root: Path) -> Iterator[Committing]:
    """Test how commits can be made below `root` (made if need be), and hold what that takes.

    Yields the way. ConfigError where `root` cannot be written, RunError where its store has none of the
    ways, or where another run is its coordinator.
    """
    if is_remote(root):
        _require_conditional_put(root)
        yield "put"
        return
    try:
        make_folder(root)
        _keep_records(root)
        linked = _has_links(root)
    except OSError as error:
        if error.errno in _MAY_MEND:
            raise RunError(
                f"{root} cannot be written: {error.strerror}. What is committed stays; run the same command "
                "again once this is mended"
            ) from error
        raise ConfigError(f"output: {root} cannot be written: {error.strerror}") from error
    if linked:
        yield "link"
        return
    root = root.absolute()
    with coordinator_lock(root, temp_prefix=TEMP_PREFIX):
        _coordinated.add(root)
        try:
            yield "coordinator"
        finally:
            _coordinated.discard(root)


def temp_path(folder: Path) -> Path:
    """A fresh local temp name for a file on its way into `folder`, which is made if need be."""
    token = f"{os.getpid()}-{secrets.token_hex(6)}"
    if is_remote(folder):
        return Path(tempfile.gettempdir()) / f"{LOCAL_TEMP_PREFIX}{token}"
    make_folder(folder)
    return folder / f"{TEMP_PREFIX}{token}"


def make_folder(folder: Path) -> None:
    """`mkdir -p` whose entries survive a power cut, the old ones too; object stores have no folders."""
    if is_remote(folder):
        return
    folder = folder.absolute()
    is_new = not folder.is_dir()
    if is_new:
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
    about = folder.stat()
    this = (folder, about.st_dev, about.st_ino)
    if this in _lasting and not is_new:  # a new folder may have the inode of one that was removed
        return
    if is_new:
        sync_folder(folder.parent)
    elif folder.parent != folder and folder.parent.stat().st_dev == about.st_dev:  # nobody made a mount point
        make_folder(folder.parent)
        with contextlib.suppress(PermissionError):  # a folder above that may not be read is not of a run
            sync_folder(folder.parent)
    _lasting.add(this)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (new names, renames) durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(temp: Path, final: Path) -> None:
    """Give a written and fsynced temp file its content-hash name; overwriting equal content is harmless."""
    if is_remote(final):
        object_store.upload(temp, final)
        temp.unlink()
        return
    os.rename(temp, final)
    sync_folder(final.parent)


def commit_once(path: Path, data: bytes | memoryview) -> bool:
    """Durably create `path` holding `data`; False where somebody else was first. Never overwrites."""
    if is_remote(path):
        return object_store.put_once(path, bytes(data))
    temp = _write_temp(path.parent, data)
    is_first = True
    try:
        os.link(temp, path)
    except FileExistsError:
        is_first = False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        is_first = _record(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    sync_folder(path.parent)  # also the record of somebody else, who may have died before doing so
    return is_first


def replace(path: Path, data: bytes | memoryview) -> None:
    """Write a rebuildable file whole: readers see the old one or the new one."""
    if is_remote(path):
        object_store.put(path, bytes(data))
        return
    temp = _write_temp(path.parent, data)
    try:
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _record(temp: Path, path: Path) -> bool:
    """Create a record as the coordinator: nobody else does, so looking first is enough."""
    if _coordinated.isdisjoint(path.absolute().parents):
        raise RunError(
            f"the file system of {path.parent} has no hard links, so only the run that holds the lock of "
            "its dataset may commit there; choose an output folder on another file system"
        )
    with _recording:
        if path.exists():
            return False
        os.rename(temp, path)
        return True


def _keep_records(root: Path) -> None:
    """Make the records durable that a killed run may have left without: this one takes them as done."""
    commits = root / "commits"
    for folder in (root, root / "manifest", commits, *commits.glob("*")):
        if folder.is_dir():
            sync_folder(folder)


def _has_links(root: Path) -> bool:
    """Whether `link` works here and spares what is there."""
    temp, record = temp_path(root), temp_path(root)
    try:
        temp.touch(exist_ok=False)
        try:
            os.link(temp, record)
            os.link(temp, record)
        except FileExistsError:
            return True
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
        return False
    finally:
        record.unlink(missing_ok=True)
        temp.unlink(missing_ok=True)


def _require_conditional_put(root: Path) -> None:
    """RunError where a second writer of one object is not refused."""
    probe = root / f"{TEMP_PREFIX}probe-{secrets.token_hex(6)}"
    try:
        refused = object_store.put_once(probe, b"first") and not object_store.put_once(probe, b"second")
        object_store.delete(probe)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES):
            raise ConfigError(f"output: {root} cannot be written: {error.strerror}") from error
        if error.errno == errno.EIO:
            raise RunError(
                f"{root}: its object store fails: {error.strerror}. Run the same command again when it works"
            ) from error
        raise RunError(
            f"{root}: the store cannot do what commits need (a put on the condition that there is no such "
            f"object yet, If-None-Match: *): {error.strerror}"
        ) from error
    if not refused:
        raise RunError(
            f"{root}: the store overwrites an object although it is asked not to (If-None-Match: *), so "
            "commits cannot be safe on it; use a store, or a version of it, that has conditional puts"
        )


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
