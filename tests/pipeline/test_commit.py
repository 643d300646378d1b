"""The commit protocol: first writer wins, and nothing half-written is ever visible."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import commit
from pipeline.coordinator import LOCK_NAME
from schemas.errors import ConfigError, RunError


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

    commit.make_folder(tmp_path)
    watch("fsync")
    watch("link")
    commit.commit_once(tmp_path / "u.json", b"x")
    assert calls == ["fsync", "link", "fsync"]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that are synced, by a process that knows nothing of any folder yet."""
    paths: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        paths.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(commit, "_lasting", set())
    return paths


def test_a_folder_that_a_dead_run_made_is_synced_once(tmp_path: Path, synced: list[str]) -> None:
    folder = tmp_path / "data" / "latents" / "00"
    folder.mkdir(parents=True)
    commit.make_folder(folder)
    above = [str(path) for path in (tmp_path, tmp_path / "data", tmp_path / "data" / "latents")]
    assert synced[-3:] == above, "outermost first"
    synced.clear()
    commit.make_folder(folder)
    commit.make_folder(folder.parent)
    assert not synced
    folder.rmdir()
    commit.make_folder(folder)
    assert synced == above[-1:], "it is another folder now"


def test_a_folder_above_that_may_not_be_read_is_passed_over(
    tmp_path: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Path, flags: int) -> int:
        if path == tmp_path:
            raise PermissionError(13, "Permission denied")
        return real(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    (tmp_path / "data" / "latents").mkdir(parents=True)
    commit.make_folder(tmp_path / "data" / "latents")
    assert synced[-1] == str(tmp_path / "data")
    with pytest.raises(PermissionError):
        commit.make_folder(tmp_path / "new")


def test_what_a_dead_run_recorded_is_synced_before_it_is_trusted(tmp_path: Path, synced: list[str]) -> None:
    for name in ("manifest", "commits/00", "commits/01"):
        (tmp_path / name).mkdir(parents=True)
    with commit.open_store(tmp_path):
        trusted = {str(tmp_path / name) for name in ("", "manifest", "commits", "commits/00", "commits/01")}
        assert trusted <= set(synced)


def test_the_record_of_whoever_was_first_is_synced(tmp_path: Path, synced: list[str]) -> None:
    (tmp_path / "u.json").write_bytes(b"theirs")
    assert not commit.commit_once(tmp_path / "u.json", b"ours")
    assert synced[-1] == str(tmp_path)


def test_a_new_file_system_is_an_empty_folder() -> None:
    assert commit.is_scaffold("lost+found")
    assert not commit.is_scaffold("notes.txt")


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system as FAT is."""

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


def test_a_file_system_with_links_is_found_and_left_as_it_was(tmp_path: Path) -> None:
    with commit.open_store(tmp_path / "new" / "latents") as committing:
        assert committing == "link"
    assert names(tmp_path / "new" / "latents") == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="file/latents cannot be written"):
        commit.open_store(tmp_path / "file" / "latents").__enter__()


@pytest.mark.usefixtures("without_links")
def test_without_links_one_coordinator_records(tmp_path: Path) -> None:
    path = tmp_path / "commits" / "00" / "u.json"
    with commit.open_store(tmp_path) as committing:
        assert committing == "coordinator"
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i: commit.commit_once(path, str(i).encode()), range(64)))
        assert won.count(True) == 1
        assert path.read_bytes() == str(won.index(True)).encode()
        assert names(path.parent) == ["u.json"]
    assert names(tmp_path) == ["commits"]
    with pytest.raises(RunError, match="no hard links"):
        commit.commit_once(tmp_path / "v.json", b"x")


@pytest.mark.usefixtures("without_links")
def test_a_second_coordinator_is_told_who_the_first_is(tmp_path: Path) -> None:
    with commit.open_store(tmp_path), pytest.raises(RunError, match=f"process {os.getpid()} on "):
        commit.open_store(tmp_path).__enter__()
    with commit.open_store(tmp_path) as committing:
        assert committing == "coordinator"
    assert names(tmp_path) == []


def hold(root: Path) -> int:
    """A process of this host that dies while it is the coordinator; its number."""
    script = (
        "import os, sys; from pathlib import Path; from pipeline import commit\n"
        "def refuse(*_): raise PermissionError(1, 'no links')\n"
        "os.link = refuse\n"
        "held = commit.open_store(Path(sys.argv[1])); held.__enter__(); os.kill(os.getpid(), 9)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(root)]) as process:
        assert process.wait() == -9
    return process.pid


@pytest.mark.usefixtures("without_links")
def test_the_lock_of_a_dead_process_is_taken_over_once(tmp_path: Path) -> None:
    hold(tmp_path)
    assert LOCK_NAME in names(tmp_path)
    heirs: list[str] = []

    def inherit(_: int) -> str:
        try:
            with commit.open_store(tmp_path) as committing:
                everybody_tried.wait(timeout=60)
                return committing
        except RunError as error:
            everybody_tried.wait(timeout=60)
            return "refused" if f"process {os.getpid()} on" in str(error) else str(error)

    everybody_tried = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        heirs += pool.map(inherit, range(8))
    assert sorted(heirs) == ["coordinator", *["refused"] * 7]
    (heirloom,) = names(tmp_path)
    assert commit.is_scaffold(heirloom), "left for gc"


@pytest.mark.usefixtures("without_links")
@pytest.mark.parametrize("changed", [{"host": "elsewhere"}, {"boot": "before"}, {"started": None}])
def test_a_lock_is_judged_by_host_boot_and_start(tmp_path: Path, changed: dict[str, str | None]) -> None:
    """Elsewhere a process number means nothing; here one with another start is another process."""
    with commit.open_store(tmp_path):
        owner = json.loads((tmp_path / LOCK_NAME / "owner.json").read_bytes())
    (tmp_path / LOCK_NAME).mkdir()
    (tmp_path / LOCK_NAME / "owner.json").write_text(json.dumps(owner | changed))
    if "started" in changed:
        with commit.open_store(tmp_path) as committing:
            assert committing == "coordinator"
    else:
        with pytest.raises(RunError, match=f"remove the folder {tmp_path / LOCK_NAME}"):
            commit.open_store(tmp_path).__enter__()
        assert names(tmp_path) == [LOCK_NAME]


@pytest.mark.usefixtures("without_links")
def test_a_lock_that_says_nothing_is_for_a_person(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).mkdir()
    (tmp_path / LOCK_NAME / "else").write_bytes(b"")
    with pytest.raises(RunError, match="is not the lock of any run"):
        commit.open_store(tmp_path).__enter__()
    assert names(tmp_path) == [LOCK_NAME]


@pytest.mark.usefixtures("without_links")
def test_a_rename_that_replaces_folders_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(RunError, match="neither hard links nor a rename that spares"):
        commit.open_store(tmp_path).__enter__()
