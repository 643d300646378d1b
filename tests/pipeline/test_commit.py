"""The commit protocol: first writer wins, and nothing half-written is ever visible."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import commit
from schemas.errors import RunError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_of_many_racing_writers_wins(tmp_path: Path) -> None:
    path = tmp_path / "commits" / "00" / "u.json"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: commit.commit_once(path, str(i).encode()), range(64)))
    assert won.count(True) == 1
    assert path.read_bytes() == str(won.index(True)).encode()
    assert names(path.parent) == ["u.json"]


def test_replace_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index"
    commit.replace(path, b"old")

    def broken(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="No space"):
        commit.replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["index"]


def test_a_file_system_without_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(RunError, match="no hard links"):
        commit.commit_once(tmp_path / "u.json", b"x")
    assert names(tmp_path) == []


def test_the_record_is_synced_before_it_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protocol order: data durable, then the name, then the folder."""
    calls: list[str] = []

    def watch(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object) -> object:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, call)

    watch("fsync")
    watch("link")
    commit.commit_once(tmp_path / "u.json", b"x")
    assert calls == ["fsync", "link", "fsync"]
