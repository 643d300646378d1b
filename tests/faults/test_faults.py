"""A seeded sample of what `make faults` does whole: faults cost nothing but the time to run again."""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from tests.faults import events
from tests.faults.disks import Disk, build, power_cuts
from tests.faults.events import Ground, Outcome
from tests.faults.evidence import torn
from tests.faults.taps import Plan

T = TypeVar("T")


def some(population: Sequence[T], count: int) -> list[T]:
    """A sample, the same in every run."""
    return random.Random(4).sample(population, count)


def fine(outcome: Outcome) -> Outcome:
    assert not outcome.problems, f"{outcome.kind}, {outcome.where}: {outcome.problems}"
    return outcome


def the_call(ground: Ground, kind: str, name: str) -> int:
    """The call that gives the last file whose name holds `name` to `kind`."""
    found = [i for i, op in enumerate(ground.ops) if op.kind == kind and name in f"{op.path} {op.target}"]
    return found[-1]


@pytest.mark.parametrize("action", ["before", "half", "after"])
def test_killed_at_any_call(ground: Ground, action: str) -> None:
    calls = [i for i, op in enumerate(ground.ops) if action != "half" or op.kind == "write"]
    for at in some(calls, 3):
        outcome = fine(events.at_call(ground, Plan(at=at, action=action)))  # type: ignore[arg-type]
        assert outcome.ended == "killed"


@pytest.mark.parametrize("target", ["driver", "tree", "decoder"])
def test_killed_at_any_time(ground: Ground, target: events.Target) -> None:
    outcomes = [fine(events.at_time(ground, target, after_s)) for after_s in (0.02, 0.2)]
    assert sum(outcome.kills for outcome in outcomes)


@pytest.mark.parametrize(
    ("error", "lasts"), [(errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, True), (errno.EROFS, True)]
)
def test_a_bad_disk_is_said_plainly_and_the_run_resumes(ground: Ground, error: int, lasts: bool) -> None:
    for at in some(range(len(ground.ops)), 2):
        fine(events.at_call(ground, Plan(at=at, action="error", error=error, lasts=lasts)))


def test_a_power_cut_leaves_nothing_that_lies(ground: Ground, tmp_path: Path) -> None:
    cuts = list(power_cuts(ground.ops))
    for number, state in cuts:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        build(state, folder)
        assert not list(torn(folder / "latents")), f"after {number} calls"
    for number, state in some(cuts, 2):
        fine(events.power_cut(ground, number, state))


def test_what_a_finished_run_made_survives_a_power_cut(ground: Ground, tmp_path: Path) -> None:
    disk = Disk()
    for op in ground.ops:
        disk.apply(op)
    least, *_ = disk.after_power_cut()
    build(least, tmp_path)
    assert not list(ground.reference.differences(tmp_path / "latents"))


def test_what_a_resumed_run_made_survives_a_power_cut(ground: Ground) -> None:
    """Also where the first was killed between the name of a folder, a shard or a record and its fsync."""
    names = [("mkdir", "latents/latents/00"), ("link", "commits/00/u"), ("rename", ".tar"), ("link", "card")]
    for at in (the_call(ground, kind, name) for kind, name in names):
        assert fine(events.resumed(ground, at)).kills


def test_a_writer_that_wakes_late_changes_nothing(ground: Ground) -> None:
    """It slept between the name of its shard and its record, and before anything was there."""
    for at in (the_call(ground, "link", "commits/00/u"), the_call(ground, "link", "card.json")):
        assert fine(events.stopped(ground, Plan(at=at, action="stop"), asleep_s=0)).ended == "finished"


def test_two_drivers_do_no_harm(ground: Ground) -> None:
    fine(events.two_drivers(ground, apart_s=0))
    fine(events.two_drivers(ground, apart_s=0.1, kill_after_s=0.1))


def test_a_real_disk_that_is_full_or_read_only(ground: Ground, tmp_path: Path) -> None:
    if not events.can_mount(tmp_path):
        pytest.skip("this process may not mount a tmpfs")
    for kib in (40, 180):
        assert fine(events.full_disk(ground, kib)).ended == "stopped"
    assert (
        fine(events.read_only_disk(ground, Plan(at=the_call(ground, "link", "t00000000")))).ended == "stopped"
    )
    fine(events.read_only_disk(ground, None))


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_actor_costs_nothing(ground: Ground) -> None:
    outcome = fine(events.on_ray(ground, "actor", committed=False, after_s=1, resume_on_ray=True))
    assert (outcome.kills, outcome.ended) == (1, "finished")
