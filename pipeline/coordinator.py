"""The coordinator lock: one driver alone records commits where a file system has no hard links.

In: the folder of a dataset. Out: the lock, held as long as a `with` block. The lock is a folder that
holds a file about its owner: `rename` of such a folder fails where a filled one is in its place, so the
lock appears whole or not at all. Trade-off: nobody can tell whether an owner on another host still
lives, so such a lock is for a person to remove. So is that of this host before a reboot, or of another
container: a host name alone does not say that it is the same machine.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from schemas.errors import RunError

LOCK_NAME = ".coordinator"
_OWNER = "owner.json"
_TRIES, _PAUSE_S = 100, 0.01


@contextlib.contextmanager
def coordinator_lock(root: Path, *, temp_prefix: str) -> Iterator[None]:
    """Hold the lock of `root`; RunError naming the owner where somebody else does.

    The lock of a process of this host that is gone is taken over: it is renamed to a name made of its
    own token, which only one of several heirs can do. RunError too where rename replaces filled folders.
    """
    token = secrets.token_hex(6)
    lock, ours = root / LOCK_NAME, root / f"{temp_prefix}lock-{token}"
    _make(ours, {**_here(), "token": token, "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    try:
        _take(lock, ours)
    except BaseException:
        shutil.rmtree(ours, ignore_errors=True)
        raise
    try:
        _require_exclusive(lock, root / f"{temp_prefix}lock-{secrets.token_hex(6)}")
        yield
    finally:
        if _owner(lock).get("token") == token:  # else a person removed it, and somebody else has it now
            os.rename(lock, ours)
            shutil.rmtree(ours, ignore_errors=True)


def _take(lock: Path, ours: Path) -> None:
    for _ in range(_TRIES):
        if _move(ours, lock):
            return
        owner = _owner(lock)
        if not owner:
            time.sleep(_PAUSE_S)  # let go between the two looks
            continue
        if not _is_gone(owner):
            raise RunError(
                f"{lock.parent} has no hard links, so one run at a time may write to it, and process "
                f"{owner.get('pid')} on {owner.get('host')} does since {owner.get('since')}. Wait for it; "
                f"if it is no longer there, remove the folder {lock} and run the same command again"
            )
        heirloom = ours.with_name(f"{ours.name.rpartition('-')[0]}-{owner['token']}")
        with contextlib.suppress(FileNotFoundError):
            if _move(lock, heirloom):
                os.utime(heirloom)  # it stays until gc removes it by age: heirs that are late must meet it
    raise RunError(
        f"{lock} is not the lock of any run; remove that folder once no run writes to {lock.parent}"
    )


def _require_exclusive(lock: Path, rival: Path) -> None:
    _make(rival, {})
    try:
        if _move(rival, lock):
            raise RunError(
                f"the file system of {lock.parent} has neither hard links nor a rename that spares what is "
                "there, so commits cannot be safe on it; choose an output folder on another file system"
            )
    finally:
        shutil.rmtree(rival, ignore_errors=True)


def _make(folder: Path, owner: dict[str, Any]) -> None:
    folder.mkdir()
    with (folder / _OWNER).open("x", encoding="utf-8") as file:
        json.dump(owner, file)
        file.flush()
        os.fsync(file.fileno())


def _move(source: Path, target: Path) -> bool:
    """Rename a filled folder; False where another filled one is at `target`."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _owner(lock: Path) -> dict[str, Any]:
    """What the lock says; nothing where there is none, or it is no lock."""
    try:
        owner = json.loads((lock / _OWNER).read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) and owner.keys() >= {"token", "pid", "started"} else {}


def _here() -> dict[str, Any]:
    """This process, and what has to be equal for another's process number to mean anything here."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    host = {"host": socket.gethostname(), "boot": boot, "pids": os.readlink("/proc/self/ns/pid")}
    return {**host, "pid": os.getpid(), "started": _started(os.getpid())}


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner certainly lives no more: only of this host, boot and process namespace."""
    here = _here()
    if any(owner.get(name) != here[name] for name in ("host", "boot", "pids")):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it lives, as somebody else's
    try:
        return _started(owner["pid"]) != owner["started"]
    except FileNotFoundError:  # hidden from us, or gone just now: the next run will know
        return False


def _started(pid: int) -> str | None:
    """When a process began, in ticks since boot; None for one that is dead but not yet waited for."""
    state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if state == "Z" else rest[18]
