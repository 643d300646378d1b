"""A run whose disk, driver, neighbours or Ray fail: one plain sentence, and the same command finishes it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import progress, ray_crew
from pipeline.graph import committed_before, preprocess
from pipeline.progress import EarlyStop
from pipeline.retry import retry_failed
from pipeline.unit import UnitResult, UnitWorker
from schemas.card import read_card
from schemas.check import check_dataset
from schemas.config import QuarantineConfig
from schemas.dataset import Dataset
from schemas.errors import ConfigError, RunError
from schemas.index import read_index, read_quarantine
from tests.conftest import REPOSITORY
from tests.pipeline.test_graph import config_for, shard_hashes
from tests.videos import make_video

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows, of which one cannot be opened."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(3):
        make_video(folder / f"{i}.mp4", num_frames=20 + i)
    (folder / "broken.mp4").write_bytes(b"no video")
    rows: list[dict[str, Any]] = [{"video": "broken.mp4", "caption": "broken"}]
    rows += [{"video": f"{i % 3}.mp4", "caption": f"{i}", "end_s": 0.5 + i / 50} for i in range(11)]
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def undisturbed(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("out") / "latents"
    preprocess(config_for(manifest, root))
    return root


def assert_finishes(manifest: Path, root: Path, undisturbed: Path) -> None:
    """The same command again ends with the dataset that an undisturbed run makes."""
    summary, _ = preprocess(config_for(manifest, root))
    assert (summary["kept"], summary["quarantined"]) == (11, 1)
    assert shard_hashes(root).items() >= shard_hashes(undisturbed).items()
    assert read_index(root).equals(read_index(undisturbed))
    assert check_dataset(root).clean


@pytest.mark.parametrize("target", ["index.parquet", "quarantine.parquet", "summary.json", "config.toml"])
def test_a_full_disk_names_the_place_and_leaves_no_temp_file(
    manifest: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """The rename that makes the file visible fails, as it does where a folder cannot grow."""
    root = tmp_path / "out"
    real: dict[str, Any] = {name: getattr(os, name) for name in ("replace", "rename")}

    def full(name: str) -> Any:
        def move(source: Any, to: Any) -> None:
            if Path(to).name == target:
                raise OSError(errno.ENOSPC, "No space left on device", str(to))
            real[name](source, to)

        return move

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, full(name))
        with pytest.raises(RunError, match=rf"the disk is full at .*{target}.*run the same command again"):
            preprocess(config_for(manifest, root))
    assert not list(root.rglob(".tmp-*"))
    assert_finishes(manifest, root, undisturbed)


def test_a_log_that_cannot_be_written_stops_the_run(
    manifest: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(facts: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(progress, "json", SimpleNamespace(dumps=full))
        with pytest.raises(RunError, match=rf"the disk is full at {tmp_path}/out"):
            preprocess(config_for(manifest, tmp_path / "out"))
    assert_finishes(manifest, tmp_path / "out", undisturbed)


def test_a_file_system_that_is_really_full(manifest: Path, undisturbed: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=420k", "tmpfs", disk], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(RunError, match=r"the disk is full at .*disk.*run the same command again"):
            preprocess(config_for(manifest, disk / "out"))
        assert not list(disk.rglob(".tmp-*"))
        done = len(list(disk.rglob("commits/*/*.json")))
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert_finishes(manifest, disk / "out", undisturbed)
        assert 0 < done < 12
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(ConfigError, match=r"output: .*cannot be written: Read-only file system"):
            preprocess(config_for(manifest, disk / "out"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_what_passes_is_tried_again_and_told(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = UnitWorker.run
    failures = iter([OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")])

    def shaky(self: UnitWorker, unit: Any, **kwargs: Any) -> UnitResult:
        if unit.family == "latents" and (error := next(failures, None)):
            raise error
        return run(self, unit, **kwargs)

    monkeypatch.setattr(UnitWorker, "run", shaky)
    summary, _ = preprocess(config_for(manifest, tmp_path / "out"))
    assert summary["kept"] == 11
    assert summary["last_run"]["latents"]["incidents"] == {"retried": 2}
    assert summary["last_run"]["sandbox"]
    (log,) = (tmp_path / "out" / "runs").glob("*/log.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["incident"] for line in lines if "incident" in line] == ["retried", "retried"]
    assert sum(line.get("kept", 0) for line in lines if line.get("family") == "latents") == 11


def result_with(kept: int, failed: int, reason: str = "open_failed") -> UnitResult:
    return UnitResult("latents", 0, kept, ((reason, "x.mp4"),) * failed, 0.0, 0, {})


def test_the_first_rows_are_judged_once_however_many_runs_they_take() -> None:
    early = EarlyStop(10, Counter(open_failed=140), allowed=0.05)
    early.add(result_with(0, 40))
    assert early.verdict() is None
    early.add(result_with(5, 5))
    assert "185 of the first 200" in (early.verdict() or "")
    good = EarlyStop(200, Counter(), allowed=0.05)
    good.add(result_with(0, 1000))
    assert good.verdict() is None


@pytest.mark.parametrize(
    ("kept", "failed", "reason", "allowed", "stops"),
    [
        (0, 250, "too_short", 0.05, False),
        (40, 160, "open_failed", 0.9, False),
        (40, 160, "open_failed", 0.7, True),
    ],
)
def test_failures_that_are_asked_for_or_allowed_stop_nothing(
    kept: int, failed: int, reason: str, allowed: float, stops: bool
) -> None:
    early = EarlyStop(0, Counter(), allowed=allowed)
    early.add(result_with(kept, failed, reason))
    assert (early.verdict() is not None) == stops


def test_an_early_stop_counts_what_an_interrupted_run_did_and_lists_the_failures(tmp_path: Path) -> None:
    rows = []
    for i in range(240):
        (tmp_path / f"{i}.mp4").write_bytes(b"not a video %d" % i)
        rows.append(json.dumps({"video": f"{i}.mp4", "caption": "x"}) + "\n")
    manifest, root = tmp_path / "manifest.jsonl", tmp_path / "out"
    manifest.write_text("".join(rows[:160]))
    preprocess(config_for(manifest, root, units={"rows": 20}))
    manifest.write_text("".join(rows))
    with pytest.raises(RunError, match=r"200 of the first 200 clips failed, 200 of them with 'open_failed'"):
        preprocess(config_for(manifest, root, units={"rows": 20}))
    assert read_quarantine(root).num_rows == 200
    assert "200 of the first" in json.loads((root / "summary.json").read_bytes())["last_run"]["stopped"]
    config = config_for(manifest, root, units={"rows": 20})
    with pytest.raises(RunError, match="200 of the first 200"):  # running it again is no way around it
        preprocess(config)
    assert read_quarantine(root).num_rows == 200
    allowed = config.model_copy(update={"quarantine": QuarantineConfig(max_rate=1.0)})
    assert preprocess(allowed)[0]["quarantined"] == 240


def test_rows_that_are_tried_again_no_longer_speak_against_a_run(tmp_path: Path) -> None:
    rows = []
    for i in range(200):
        (tmp_path / f"{i}.mp4").write_bytes(b"not a video %d" % i)
        rows.append(json.dumps({"video": f"{i}.mp4", "caption": "x"}) + "\n")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(rows))
    config = config_for(manifest, tmp_path / "out", units={"rows": 100})
    with pytest.raises(RunError, match="200 of the first 200"):
        preprocess(config)
    dataset = Dataset(tmp_path / "out")
    assert committed_before(dataset, "latents", dataset.history()) == (0, Counter(open_failed=200))
    retry_failed(dataset, read_card(dataset.root), reasons=None)
    assert committed_before(dataset, "latents", dataset.history()) == (0, Counter())


def test_a_damaged_summary_is_made_again(manifest: Path, tmp_path: Path) -> None:
    config = config_for(manifest, tmp_path / "out")
    preprocess(config)
    (tmp_path / "out" / "summary.json").write_text("garbage")
    summary, ran = preprocess(config)
    assert (summary["kept"], ran) == (11, False)
    assert json.loads((tmp_path / "out" / "summary.json").read_bytes()) == summary


def test_what_another_run_asks_for_meanwhile_is_said(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(manifest, tmp_path / "out")
    other = manifest.with_name("other.jsonl")
    lines = manifest.read_text().splitlines(keepends=True)
    other.write_text("".join(lines[:3]))
    run = UnitWorker.run

    def meanwhile(self: UnitWorker, unit: Any, **kwargs: Any) -> UnitResult:
        monkeypatch.setattr(UnitWorker, "run", run)
        preprocess(config.model_copy(update={"manifest": str(other)}))
        return run(self, unit, **kwargs)

    monkeypatch.setattr(UnitWorker, "run", meanwhile)
    summary, _ = preprocess(config)
    assert summary["asked_meanwhile"]
    assert preprocess(config)[0]["asked_meanwhile"] is False


CONFIG = """
manifest = {manifest}
output = {output}
[[buckets]]
num_frames = 9
height = 32
width = 48
[[buckets]]
num_frames = 9
height = 48
width = 32
[units]
rows = 2
[executor]
kind = {kind}
workers = 2
"""


SLOW_WORKERS = """
import time
from jobs.cli import main
from pipeline import ray_crew
class Slow(ray_crew.UnitWorker):
    def run(self, unit, **kwargs):
        time.sleep(120)
ray_crew.UnitWorker = Slow
main()
"""


class Driver:
    """The command in a process of its own; what it says goes to a file, which nobody can block."""

    def __init__(
        self, manifest: Path, root: Path, *, kind: str, program: tuple[str, str] = ("-m", "jobs.cli")
    ) -> None:
        config, self._said = root.parent / "config.toml", root.parent / "said.txt"
        values = {"manifest": str(manifest), "output": str(root), "kind": kind}
        config.write_text(CONFIG.format(**{name: json.dumps(value) for name, value in values.items()}))
        with self._said.open("w") as said:
            command = [sys.executable, *program, "preprocess", str(config)]
            self.process = subprocess.Popen(command, cwd=REPOSITORY, stdout=said, stderr=said)

    def descendant(self, name: str) -> int:
        """The pid of a process below the driver whose command line holds `name`, once there is one."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := [pid for pid, args in descendants(self.process.pid).items() if name in args]:
                return found[0]
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"no {name}: {self._said.read_text()}")

    def end(self) -> tuple[int, list[str]]:
        """Its exit code, and the lines it said."""
        return self.process.wait(90), self._said.read_text().splitlines()


def processes() -> dict[int, tuple[int, str]]:
    """pid -> (parent, command line) of all that live."""
    listed = subprocess.run(["ps", "-wweo", "pid,ppid,stat,args"], capture_output=True, text=True, check=True)
    fields = [line.split(None, 3) for line in listed.stdout.splitlines()[1:]]
    return {int(pid): (int(parent), args) for pid, parent, stat, args in fields if stat[0] != "Z"}


def descendants(pid: int) -> dict[int, str]:
    alive = processes()
    found = {pid}
    while more := {child for child, (parent, _) in alive.items() if parent in found} - found:
        found |= more
    return {child: alive[child][1] for child in found - {pid}}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_ended_takes_its_children_with_it(
    manifest: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    driver = Driver(manifest, tmp_path / "out", kind="local")
    driver.descendant("pipeline.sandbox_child")
    children = set(descendants(driver.process.pid))
    driver.process.send_signal(number)
    code, said = driver.end()
    if number == signal.SIGTERM:
        assert code == 1, said
        assert "interrupted; preprocess and import go on where they were" in said[-1]
    await_end(children)
    assert_finishes(manifest, tmp_path / "out", undisturbed)


def await_end(pids: set[int]) -> None:
    deadline = time.monotonic() + 30
    while left := pids & processes().keys():
        assert time.monotonic() < deadline, [processes()[pid] for pid in left]
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("victim", "name"), [("gcs/gcs_server", "head"), ("raylet/raylet", "raylet")])
def test_a_run_whose_ray_is_killed_ends_with_a_sentence_and_can_be_resumed(
    manifest: Path, undisturbed: Path, tmp_path: Path, victim: str, name: str
) -> None:
    driver = Driver(manifest, tmp_path / "out", kind="ray", program=("-c", SLOW_WORKERS))
    worker = driver.descendant("ray::Slow.run")
    os.kill(driver.descendant(victim), signal.SIGKILL)
    code, said = driver.end()
    assert code == 1, said
    assert said[-1].startswith(f"latentpress: Ray's {name} (")
    assert "run the same command again" in said[-1]
    await_end({worker})
    assert_finishes(manifest, tmp_path / "out", undisturbed)


@pytest.mark.ray
@pytest.mark.slow
def test_a_row_that_kills_its_actor_is_one_failure(
    manifest: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = read_index(undisturbed).to_pylist()[4]["sample_id"]

    class Deadly(UnitWorker):
        def run(self, unit: Any, **kwargs: Any) -> UnitResult:
            if poison in {row["key"] for row in unit.rows} - set(kwargs["condemned"]):
                os.kill(os.getpid(), signal.SIGSEGV)
            return super().run(unit, **kwargs)

        def try_row(self, unit: Any, key: str) -> None:
            if key == poison:
                os.kill(os.getpid(), signal.SIGSEGV)
            super().try_row(unit, key)

    monkeypatch.setattr(ray_crew, "UnitWorker", Deadly)
    executor = {"kind": "ray", "workers": 2}
    summary, _ = preprocess(config_for(manifest, tmp_path / "out", executor=executor))
    assert (summary["kept"], summary["quarantined"]) == (10, 2)
    incidents = summary["last_run"]["latents"]["incidents"]
    # Deaths right after a commit whose answer was lost with the worker are blamed on nobody.
    assert 4 <= incidents.pop("worker_died") <= 6
    assert incidents == {"unit_isolated": 1, "row_condemned": 1}
    failed = {row["sample_id"]: row for row in read_quarantine(tmp_path / "out").to_pylist()}
    assert (failed[poison]["reason"], failed[poison]["attempts"]) == ("worker_crash", 2)
    assert check_dataset(tmp_path / "out").clean
    assert len(shard_hashes(tmp_path / "out").items() & shard_hashes(undisturbed).items()) >= 9
