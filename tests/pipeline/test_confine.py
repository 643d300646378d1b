"""The decoder's process gives up what it says it gives up, and says what this kernel cannot hold."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import sandbox
from pipeline.confine import NOT_ENFORCED, UNPRIVILEGED
from pipeline.sandbox import DecodeRequest, DecoderProcess
from schemas.config import BucketConfig, FramesConfig, LimitsConfig, ResizeConfig
from tests.videos import make_video, read_number

KEEPS_OUT = {
    "files": {"write", "change", "empty", "remove", "rename", "folder", "link"},
    "network": {"tcp"},
    "programs": {"program"},
    "root": {"root"},
}
REPOSITORY = Path(__file__).resolve().parents[2]
TRIES = """
import ctypes, json, os, resource, socket, sys, threading
from pipeline import confine
from schemas.config import DecodeConfig, LimitsConfig

folder, changes = sys.argv[1], json.loads(sys.argv[2])
decode = DecodeConfig(**changes.pop("decode", {}))
exec(changes.pop("first", ""))
keep_root = changes.pop("keep_root", False)
found = confine.confine(parent=os.getppid(), limits=LimitsConfig(), decode=decode, keep_root=keep_root)
victim = os.path.join(folder, "file")

libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)

def thread():
    one = threading.Thread(target=int)
    one.start()
    one.join()

def read():
    with open(victim) as file:
        return file.read()

attempts = {
    "write": lambda: open(os.path.join(folder, "new"), "w"),
    "change": lambda: open(victim, "r+"),
    "empty": lambda: os.truncate(victim, 0),
    "remove": lambda: os.unlink(victim),
    "rename": lambda: os.rename(victim, victim + "2"),
    "folder": lambda: os.mkdir(os.path.join(folder, "new")),
    "link": lambda: os.symlink("x", os.path.join(folder, "link")),
    "mode": lambda: os.chmod(victim, 0o777),
    "times": lambda: os.utime(victim),
    "tcp": lambda: socket.create_connection(("127.0.0.1", int(open(os.path.join(folder, "port")).read()))),
    "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "process": lambda: os.fork() or os._exit(0),
    "signal": lambda: os.kill(os.getppid(), 0),
    "own signal": lambda: os.kill(os.getpid(), 0),
    "limit": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, 19),
    "shared": lambda: call("shmget", 0, 4096, 0o1600),
    "queue": lambda: call("msgget", 0, 0o1600),
    "pair": lambda: socket.socketpair(),
    "outlive": lambda: call("prctl", 1, 0),
    "thread": thread,
    "root": lambda: os.setuid(0) or os.setgid(0),
    "read": read,
}
results = {}
for name, attempt in attempts.items():
    try:
        attempt()
    except (OSError, RuntimeError) as error:
        results[name] = str(error)
    else:
        results[name] = "done"
print(json.dumps([found, results]), flush=True)
try:
    os.execv("/bin/echo", ["echo", "another program"])
except OSError:
    pass
"""


def tried(folder: Path, **changes: Any) -> tuple[dict[str, str], set[str]]:
    """What a confined process says holds it, and what it could still do."""
    victim = folder / "file"
    victim.write_text("kept")
    victim.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as server:
        (folder / "port").write_text(str(server.getsockname()[1]))
        run = subprocess.run(
            [sys.executable, "-c", TRIES, str(folder), json.dumps(changes)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    said, _, last = run.stdout.partition("\n")
    found, results = json.loads(said)
    if last:
        results["program"] = "done"
    could = {name for name, result in results.items() if result == "done"}
    if enforced(found) & {"files"}:
        assert victim.read_text() == "kept"
        assert {path.name for path in folder.iterdir()} == {"file", "port"}
    for protection in enforced(found) & set(KEEPS_OUT):
        assert not could & KEEPS_OUT[protection], protection
    return found, could


def enforced(found: dict[str, str]) -> set[str]:
    return {name for name, how in found.items() if not how.startswith(NOT_ENFORCED)}


def test_what_is_said_to_be_in_force_holds_and_files_stay_readable(tmp_path: Path) -> None:
    found, could = tried(tmp_path)
    assert set(found) == {"memory", "root", "files", "network", "programs"}
    assert "read" in could
    if "seccomp" in found["network"]:
        assert not could & {"udp", "unix", "mode", "times"}


def test_without_landlock_the_rest_holds(tmp_path: Path) -> None:
    found, could = tried(tmp_path, first="confine._CREATE_RULESET = 9999")
    if "seccomp" in found["network"]:
        assert found["files"] == "read only (seccomp)"
    else:
        assert found["files"] == f"{NOT_ENFORCED}: this kernel has no Landlock"
    assert "read" in could


def test_without_seccomp_landlock_takes_its_place(tmp_path: Path) -> None:
    found, could = tried(tmp_path, first="confine._SECCOMP = 'libno-such.so'")
    if "files" in enforced(found):
        assert found["programs"] == "Landlock"
    assert "libno-such.so is not installed" in found["network"]
    assert "read" in could


def test_without_either_it_says_so_and_runs(tmp_path: Path) -> None:
    nothing = "confine._CREATE_RULESET = 9999; confine._SECCOMP = 'libno-such.so'"
    found, could = tried(tmp_path, first=nothing)
    assert enforced(found) <= {"memory", "root"}
    assert {"read", "udp"} <= could


@pytest.mark.parametrize("keep_root", [False, True])
def test_with_threads_there_are_still_no_processes_and_no_say_over_others(
    tmp_path: Path, keep_root: bool
) -> None:
    found, could = tried(tmp_path, decode={"threads": 4}, keep_root=keep_root)
    assert {"read", "thread", "own signal"} <= could
    if "seccomp" in found["programs"]:
        assert not could & {"process", "signal", "limit", "priority", "shared", "pair", "queue", "outlive"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give up")
def test_a_kept_uid_has_no_rights_left(tmp_path: Path) -> None:
    found, could = tried(tmp_path, keep_root=True)
    assert found["root"] == f"{NOT_ENFORCED}: uid 0 kept, without its rights"
    assert "read" in could
    code = TRIES.partition("victim =")[0] + "print(open('/proc/self/status').read())"
    for keep, uid in ((True, 0), (False, UNPRIVILEGED)):
        run = subprocess.run(
            [sys.executable, "-c", code, "", json.dumps({"keep_root": keep})],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        lines = (line.partition(":") for line in run.stdout.splitlines())
        status = {name: value for name, _, value in lines}
        assert set(status["Uid"].split()) == {str(uid)}
        # No bit but one of the two rights to read any file.
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16)
        assert int(status["CapPrm"], 16) in (0, 1 << 1, 1 << 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be trusted more than others")
def test_a_file_that_only_uid_0_may_read_costs_the_uid_and_not_the_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stands in for a mount that lets only its owner in: the child's right to read all files is taken."""
    path = make_video(tmp_path / "clip.mp4", num_frames=9)
    path.chmod(0o600)
    program = tmp_path / "program.py"
    program.write_text(
        "from pipeline import confine, sandbox_child\n"
        "confine._CAP_DAC_READ_SEARCH = confine._CAP_DAC_OVERRIDE = 0\n"
        "sandbox_child.serve()\n"
    )
    monkeypatch.setattr(sandbox, "_told", set())
    settings: dict[str, Any] = {"frames": FramesConfig(), "resize": ResizeConfig(), "limits": LimitsConfig()}
    buckets = [BucketConfig(num_frames=9, height=64, width=96)]
    with DecoderProcess(**settings, buckets=buckets, program=[str(program)]) as process:
        for _ in range(2):
            process.submit(DecodeRequest(str(path)))
            clip = process.result()
            assert [read_number(picture) for picture in clip.frames] == list(range(9))
            clip.release()
        assert process.protections["root"].startswith(NOT_ENFORCED)
    assert capfd.readouterr().err.count("sandbox: root not enforced") == 1


def test_the_child_reports_what_holds_it(tmp_path: Path) -> None:
    expected, _ = tried(tmp_path)
    path = make_video(tmp_path / "clip.mp4", num_frames=9)
    settings: dict[str, Any] = {"frames": FramesConfig(), "resize": ResizeConfig(), "limits": LimitsConfig()}
    buckets = [BucketConfig(num_frames=9, height=64, width=96)]
    with DecoderProcess(**settings, buckets=buckets) as process:
        assert process.protections == {}
        process.place(DecodeRequest(str(path)))
        assert process.protections == expected
