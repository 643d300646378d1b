"""One fault each: made to happen to a run of the tiny job, then the same command again, then the evidence.

In: the ground (a job, what an undisturbed run of it made, and its calls) and where to strike. Out: an
`Outcome` with a sentence for everything that was wrong: none is what the protocol promises.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.collect import find_orphans, remove
from schemas.dataset import Dataset
from tests.faults.disks import Disk, State, build, power_cuts
from tests.faults.driver import Driver
from tests.faults.evidence import Reference, files, orphans, removed, torn
from tests.faults.job import Job
from tests.faults.taps import Op, Plan

_GONE_S = 10.0
"""Within which nothing that a killed driver started may be left."""
Target = Literal["driver", "tree", "decoder", "actor", "raylet", "gcs"]
_COMMANDS = {
    "decoder": "pipeline.sandbox_child",
    "actor": "ray::UnitWorker",
    "raylet": "raylet/raylet",
    "gcs": "gcs_server",
}
"""What the command line of a process to kill holds."""


@dataclass
class Outcome:
    """One event."""

    kind: str
    where: str
    kills: int = 0
    """SIGKILLs that met a living process."""
    ended: str = ""
    """`killed`, `stopped` (the run said why, in a sentence) or `finished`."""
    orphans: int = 0
    """Files left that no record names."""
    problems: list[str] = field(default_factory=list)

    def note_end(self, end: dict[str, Any]) -> None:
        names = {"summary": "finished", "error": "stopped", "signal": "killed"}
        self.ended = next((text for key, text in names.items() if key in end), "")
        if not self.ended:
            self.problems.append(f"bad end: {end}")


class Ground:
    """A job and an undisturbed run of it, below `folder`; for one thread."""

    def __init__(self, folder: Path, *, num_clips: int = 6, unit_rows: int = 2) -> None:
        self.folder = folder
        self.job = Job(folder / "job", num_clips=num_clips, unit_rows=unit_rows)
        self._numbers = itertools.count()
        Driver(self.job.config(folder / "first")).wait()  # the fork server starts, caches fill
        driver = Driver(self.job.config(folder / "undisturbed"), record=True)
        started = time.monotonic()
        end = driver.wait()
        self.seconds = time.monotonic() - started
        assert end.get("ran"), end
        self.root = folder / "undisturbed" / "latents"
        self.ops: list[Op] = driver.ops()
        self.reference = Reference.of(self.root)

    def new_folder(self) -> Path:
        folder = self.folder / f"event-{next(self._numbers):04d}"
        folder.mkdir()
        return folder

    def start(self, folder: Path, plan: Plan | None = None, *, ray_workers: int = 0) -> Driver:
        return Driver(self.job.config(folder, ray_workers=ray_workers), plan)

    def settle(self, folder: Path, outcome: Outcome, *, ray_workers: int = 0) -> Outcome:
        """Look at what is there, run the command again, and hold the result against the undisturbed run."""
        root = folder / "latents"
        outcome.problems += torn(root)
        before = files(root)
        end = self.start(folder, ray_workers=ray_workers).wait()
        if "summary" not in end:
            outcome.problems.append(f"does not resume: {end}")
            return outcome
        after = files(root)
        outcome.problems += removed(before, after)
        outcome.problems += self.reference.differences(root)
        left = orphans(root)
        outcome.orphans = len(left)
        dataset = Dataset(root)
        for orphan in find_orphans(dataset, older_than_s=0):
            remove(dataset, orphan)
        if files(root) != {name: sha256 for name, sha256 in after.items() if name not in left}:
            outcome.problems.append("different: gc did not remove the orphans and nothing else")
        return outcome


def at_call(ground: Ground, plan: Plan) -> Outcome:
    """Death, or an error, at one call that changes the dataset."""
    assert plan.at is not None
    error = f"{errno.errorcode[plan.error]}{' from' if plan.lasts else ' at'}"
    kind = f"{error} a call" if plan.action == "error" else f"kill {plan.action} a call"
    op = ground.ops[plan.at]
    outcome = Outcome(kind, f"call {plan.at}: {op.kind} {op.path} {op.target}")
    folder = ground.new_folder()
    driver = ground.start(folder, plan)
    outcome.note_end(driver.wait())
    outcome.kills = int(outcome.ended == "killed")
    _note_survivors(driver, outcome)
    return ground.settle(folder, outcome)


def at_time(ground: Ground, target: Target, after_s: float) -> Outcome:
    """Death of the driver, or of it with all it started, `after_s` into the run; of a decoder child, as
    long after it was started."""
    outcome = Outcome(f"kill {target} at a random time", f"{after_s:.3f} s")
    folder = ground.new_folder()
    driver = ground.start(folder)
    while target == "decoder" and driver.running and not _targets(driver, target):
        time.sleep(0.01)
    time.sleep(after_s)
    _strike(driver, target, outcome)
    outcome.note_end(driver.wait())
    _note_survivors(driver, outcome)
    return ground.settle(folder, outcome)


def stopped(ground: Ground, plan: Plan, *, asleep_s: float) -> Outcome:
    """A driver stopped before the call of `plan`, woken after another has finished its work."""
    assert plan.at is not None
    op = ground.ops[plan.at]
    outcome = Outcome("stopped, woken later", f"call {plan.at}: {op.kind} {op.path} {op.target}")
    folder = ground.new_folder()
    sleeper = ground.start(folder, plan)
    while sleeper.running and not sleeper.stopped:
        time.sleep(0.005)
    started = time.monotonic()
    end = ground.start(folder).wait()
    if "summary" not in end:
        outcome.problems.append(f"the other driver did not finish: {end}")
    before = files(folder / "latents")
    time.sleep(max(0.0, asleep_s - (time.monotonic() - started)))
    sleeper.signal(signal.SIGCONT)
    outcome.note_end(sleeper.wait())
    # Its own temp files it may take along.
    kept = {name: sha256 for name, sha256 in before.items() if not Path(name).name.startswith(".")}
    outcome.problems += removed(kept, files(folder / "latents"))
    return ground.settle(folder, outcome)


def two_drivers(ground: Ground, *, apart_s: float, kill_after_s: float | None = None) -> Outcome:
    """Two drivers on one dataset; with `kill_after_s` the first of them dies."""
    kind = "two drivers" if kill_after_s is None else "two drivers, one killed"
    outcome = Outcome(kind, f"{apart_s:.3f} s apart")
    folder = ground.new_folder()
    first = ground.start(folder)
    time.sleep(apart_s)
    second = ground.start(folder)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        _strike(first, "driver", outcome)
    outcome.note_end(first.wait())
    outcome.note_end(second.wait())
    _note_survivors(first, outcome)
    return ground.settle(folder, outcome)


def power_cut(ground: Ground, number: int, state: State) -> Outcome:
    """The power goes after `number` calls, and the disk comes back as `state`."""
    outcome = Outcome("power cut", f"after call {number - 1}", ended="killed")
    folder = ground.new_folder()
    build(state, folder)
    return ground.settle(folder, outcome)


def resumed(ground: Ground, at: int) -> Outcome:
    """Death after one call, the same command again, and a power cut at any time of that, or at its end.

    What the dead run did not sync is still unsafe then: the second must not build on it.
    """
    op = ground.ops[at]
    outcome = Outcome("kill, resume, power cut", f"call {at}: {op.kind} {op.path} {op.target}")
    folder = ground.new_folder()
    outcome.note_end(ground.start(folder, Plan(at=at, action="after")).wait())
    outcome.kills = int(outcome.ended == "killed")
    driver = Driver(ground.job.config(folder), record=True)
    end = driver.wait()
    if "summary" not in end:
        outcome.problems.append(f"does not resume: {end}")
        return outcome
    # The dead run's calls are those of the undisturbed one up to there, but for the names of temp files.
    ops = [*ground.ops[: at + 1], *driver.ops()]
    for number, state in power_cuts(ops):
        if number > at + 1:
            found = list(torn(_built(state, folder) / "latents"))
            outcome.problems += [f"{problem} (power cut after call {number - 1})" for problem in found]
    disk = Disk()
    for op in ops:
        disk.apply(op)
    least, *_ = disk.after_power_cut()
    outcome.problems += ground.reference.differences(_built(least, folder) / "latents")
    return outcome


def _built(state: State, folder: Path) -> Path:
    """A disk beside `folder`, in place of the last one."""
    disk = folder.with_name(f"{folder.name}-disk")
    shutil.rmtree(disk, ignore_errors=True)
    disk.mkdir()
    build(state, disk)
    return disk


def on_ray(
    ground: Ground, target: Target, *, committed: bool, after_s: float, resume_on_ray: bool = False
) -> Outcome:
    """Death of a Ray process: some time after the actors appear, or after the first latents are committed."""
    outcome = Outcome(
        f"Ray: kill {target}", f"{after_s:.2f} s after {'a commit' if committed else 'the start'}"
    )
    folder = ground.new_folder()
    driver = ground.start(folder, ray_workers=2)

    def due() -> bool:
        if committed:
            return any((folder / "latents" / "commits").rglob("u*.json"))
        return bool(_targets(driver, "actor"))

    while driver.running and not due():
        time.sleep(0.02)
    time.sleep(after_s)
    _strike(driver, target, outcome)
    outcome.note_end(driver.wait())
    _note_survivors(driver, outcome)
    return ground.settle(folder, outcome, ray_workers=2 if resume_on_ray else 0)


@contextlib.contextmanager
def small_disk(folder: Path, *, kib: int) -> Iterator[Callable[[str], None]]:
    """A tmpfs of `kib` at `folder`, and a function to mount it anew with other options; OSError where this
    process may not mount."""

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr)

    mount(f"size={kib}k")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a tmpfs, which takes root and a system that lets it."""
    trial = folder / "mount"
    trial.mkdir()
    try:
        with small_disk(trial, kib=64):
            return True
    except OSError:
        return False


def full_disk(ground: Ground, kib: int) -> Outcome:
    """A real disk that is full in the middle of the run, and gets room again."""
    outcome = Outcome("disk full (tmpfs)", f"{kib} KiB")
    folder = ground.new_folder()
    with small_disk(folder, kib=kib) as mount_anew:
        end = ground.start(folder).wait()
        outcome.note_end(end)
        if "error" in end and "full" not in end["error"]:
            outcome.problems.append(f"does not name the full disk: {end['error']}")
        mount_anew("size=64m")
        return ground.settle(folder, outcome)


def read_only_disk(ground: Ground, plan: Plan | None) -> Outcome:
    """A disk that is mounted read-only when the run begins, after another was killed (or has finished)."""
    outcome = Outcome("read-only disk", f"after call {plan.at}" if plan else "after the end")
    folder = ground.new_folder()
    with small_disk(folder, kib=1 << 16) as mount_anew:
        ground.start(folder, plan).wait()
        mount_anew("ro")
        before = files(folder / "latents")
        outcome.note_end(ground.start(folder).wait())
        if files(folder / "latents") != before:
            outcome.problems.append("different: a read-only disk was changed")
        mount_anew("rw")
        return ground.settle(folder, outcome)


def _targets(driver: Driver, target: Target) -> list[int]:
    commands = driver.offspring().items()
    return [pid for pid, command in commands if _COMMANDS[target] in command]


def _strike(driver: Driver, target: Target, outcome: Outcome) -> None:
    """SIGKILL, if what it is meant for is alive."""
    if not driver.running:
        return
    if target == "tree":
        driver.kill_tree()
        outcome.kills += 1
    elif target == "driver":
        driver.signal(signal.SIGKILL)
        outcome.kills += 1
    elif found := _targets(driver, target):
        with contextlib.suppress(ProcessLookupError):
            os.kill(random.choice(found), signal.SIGKILL)
            outcome.kills += 1


def _note_survivors(driver: Driver, outcome: Outcome) -> None:
    if left := driver.survivors(within_s=_GONE_S):
        outcome.problems.append(f"left alive after {_GONE_S:g} s: {left}")
        driver.kill_tree()
