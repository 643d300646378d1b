"""What a disk may hold after a power cut, by the calls made before it: the least that POSIX promises.

A file's bytes are safe once the file is fsynced; a name (made, renamed, linked or removed) once its folder
is. Until then each may be there or not, in any mixture. Three mixtures are built for each moment: nothing
that is not safe; every name but only safe bytes; and safe names plus the newest one, which comes before
those that it builds on. (After "All File Systems Are Not Created Equal", OSDI 2014.)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.faults.taps import Op


class _File:
    """One inode."""

    def __init__(self, *, is_folder: bool) -> None:
        self.is_folder = is_folder
        self.data = bytearray()
        self.safe = b""


State = dict[str, bytes | None]
"""Relative path -> content, None for a folder."""


class Disk:
    """Replays calls."""

    def __init__(self) -> None:
        self._names: dict[str, _File] = {}
        self._safe_names: dict[str, _File] = {}
        self._newest: str | None = None

    def apply(self, op: Op) -> None:
        names = self._names
        match op.kind:
            case "create":
                if op.path in names:
                    names[op.path].data.clear()
                else:
                    self._enter(op.path, _File(is_folder=False))
            case "mkdir":
                self._enter(op.path, _File(is_folder=True))
            case "write":
                data = names[op.path].data
                data.extend(bytes(max(0, op.offset - len(data))))
                data[op.offset : op.offset + len(op.data)] = op.data
            case "truncate":
                del names[op.path].data[op.offset :]
            case "rename":
                self._enter(op.target, names.pop(op.path))
            case "link":
                self._enter(op.target, names[op.path])
            case "unlink":
                del names[op.path]
            case "sync":
                self._sync(op.path)

    def _enter(self, path: str, file: _File) -> None:
        self._names[path] = file
        self._newest = path

    def _sync(self, path: str) -> None:
        file = self._names.get(path)
        if file is not None and not file.is_folder:
            file.safe = bytes(file.data)
            return
        for names in (self._safe_names, self._names):
            for name in [name for name in names if (os.path.dirname(name) or ".") == path]:
                if name in self._names:
                    self._safe_names[name] = self._names[name]
                else:
                    del self._safe_names[name]

    def whole(self) -> State:
        """Without a power cut."""
        return {name: None if file.is_folder else bytes(file.data) for name, file in self._names.items()}

    def after_power_cut(self) -> Iterator[State]:
        """The three mixtures."""
        yield _reachable(self._safe_names)
        yield _reachable(self._names)
        newest = self._newest
        if newest is not None and newest in self._names:
            # Its folders are taken to be there, or the name would not be.
            above = {
                name: f for name, f in self._names.items() if f.is_folder and newest.startswith(name + "/")
            }
            yield _reachable({**self._safe_names, **above, newest: self._names[newest]})


def _reachable(names: dict[str, _File]) -> State:
    """Safe bytes under those names whose folders are there too."""
    state: State = {}
    for name in sorted(names):
        above = os.path.dirname(name)
        if not above or above in state:
            state[name] = None if names[name].is_folder else names[name].safe
    return state


def power_cuts(ops: Iterable[Op]) -> Iterator[tuple[int, State]]:
    """Every different disk that a power cut may leave, and the number of calls before it."""
    disk, seen = Disk(), set[int]()
    for number, op in enumerate(ops, 1):
        disk.apply(op)
        for state in disk.after_power_cut():
            mark = hash(frozenset(state.items()))
            if mark not in seen:
                seen.add(mark)
                yield number, state


def build(state: State, folder: Path) -> None:
    """Write a disk to a real folder."""
    for name, data in sorted(state.items()):
        path = folder / name
        if data is None:
            path.mkdir(parents=True)
        else:
            path.write_bytes(data)
