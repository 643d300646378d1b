"""Digests between commands: right always, and read again only where a file changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from schemas import digest_cache
from schemas.digest_cache import _digest, file_digests


def write(path: Path, data: bytes) -> Path:
    """A file with a time of its own making."""
    path.write_bytes(data)
    os.utime(path, ns=(10**18, 10**18))
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest_cache, "_SETTLED_S", 0.0)
    return tmp_path / "cache" / "latentpress" / "sha256"


def again(path: Path) -> str:
    """As another process asks."""
    _digest.cache_clear()
    (digest,) = file_digests([path])
    return digest


def test_a_file_is_read_again_only_when_it_changed(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "a", b"one")
    assert again(path) == hashlib.sha256(b"one").hexdigest()
    (kept,) = folder.iterdir()
    kept.write_text("0" * 64)  # tells whether the file was read
    assert again(path) == "0" * 64
    kept.write_text("cut short")
    assert again(path) == hashlib.sha256(b"one").hexdigest()
    write(path, b"two")  # of the same size, its time put back
    write(tmp_path / "b", b"one")
    wanted = [hashlib.sha256(data).hexdigest() for data in (b"two", b"one")]
    assert file_digests([path, tmp_path / "b"]) == wanted


def test_what_changed_just_now_is_not_kept(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_cache, "_SETTLED_S", 60.0)
    assert again(write(tmp_path / "a", b"one")) == hashlib.sha256(b"one").hexdigest()
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", b"")))
    assert again(write(tmp_path / "a", b"one")) == hashlib.sha256(b"one").hexdigest()
