"""The fault harness can fail: broken protocols and damaged folders are found, each for what it is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import events
from tests.faults.disks import Disk, build, power_cuts
from tests.faults.driver import Driver
from tests.faults.events import Ground, Outcome
from tests.faults.evidence import files, orphans, removed, torn
from tests.faults.taps import Op, Plan


def recorded(ground: Ground, sabotage: str) -> tuple[Path, list[Op]]:
    """An undisturbed run of a broken protocol: its folder and its calls."""
    folder = ground.new_folder()
    driver = Driver(ground.job.config(folder), Plan(sabotage=sabotage), record=True)
    assert "summary" in driver.wait()
    return folder, driver.ops()


def records_made(ops: list[Op]) -> Iterator[int]:
    """Numbers of the calls that give a commit record its name, or write it there."""
    return (
        i for i, op in enumerate(ops) if "commits/" in (op.target or op.path) and "/.tmp-" not in op.target
    )


def test_the_recorder_sees_every_byte(ground: Ground) -> None:
    folder, ops = recorded(ground, "")
    disk = Disk()
    for op in ops:
        disk.apply(op)
    found = sorted(folder.rglob("*"))
    assert disk.whole() == {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in found
    }


@pytest.mark.parametrize("sabotage", ["no_file_sync", "no_folder_sync", "record_first"])
def test_a_power_cut_finds_what_was_not_synced(ground: Ground, tmp_path: Path, sabotage: str) -> None:
    _, ops = recorded(ground, sabotage)
    problems: set[str] = set()
    for number, state in power_cuts(ops):
        folder = tmp_path / f"{number}-{len(problems)}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        build(state, folder)
        problems.update(torn(folder / "latents"))
    assert any("commits/" in problem for problem in problems)


@pytest.mark.parametrize(
    ("sabotage", "kind", "action"), [("record_first", "link", "after"), ("record_in_place", "write", "after")]
)
def test_a_kill_finds_a_record_that_came_too_early(
    ground: Ground, sabotage: str, kind: str, action: str
) -> None:
    _, ops = recorded(ground, sabotage)
    at = next(i for i, op in enumerate(ops) if op.kind == kind and "00/u" in (op.target or op.path))
    folder = ground.new_folder()
    plan = Plan(at=at, action=action, sabotage=sabotage)  # type: ignore[arg-type]
    assert ground.start(folder, plan).wait() == {"signal": "SIGKILL"}
    outcome = ground.settle(folder, Outcome("", ""))
    assert any("torn: commits/00/u00000000.json" in problem for problem in outcome.problems)


def test_a_second_writer_that_wins_is_found(ground: Ground) -> None:
    _, ops = recorded(ground, "last_writer_wins")  # whose calls are not those of a run without it
    at = next(i for i, op in enumerate(ops) if op.kind == "rename" and "commits/" in op.target)
    plan = Plan(at=at, action="stop", sabotage="last_writer_wins")
    outcome = events.stopped(ground, plan, asleep_s=0)
    assert [problem for problem in outcome.problems if "was changed" in problem]


def test_a_run_that_tidies_up_is_found(ground: Ground) -> None:
    folder = ground.new_folder()
    at = next(i for i, op in enumerate(ground.ops) if op.kind == "rename" and op.target.endswith(".tar"))
    ground.start(folder, Plan(at=at)).wait()
    before = files(folder / "latents")
    ground.start(folder, Plan(sabotage="tidies_up")).wait()
    (problem,) = removed(before, files(folder / "latents"))
    assert problem.endswith("was deleted")


def test_what_is_lost_doubled_torn_or_left_behind_is_called_so(ground: Ground, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        root = tmp_path / name / "latents"
        shutil.copytree(ground.root, root)
        return root

    def found(root: Path) -> str:
        return "\n".join(ground.reference.differences(root))

    assert found(damaged("nothing")) == ""
    assert not orphans(ground.root)

    root = damaged("lost")
    (root / "commits/00/u00000001.json").unlink()
    assert "lost: " in found(root)
    assert {Path(name).name[:9] for name in orphans(root)} == {"u00000001"}

    root = damaged("doubled")
    shutil.copy(root / "commits/00/u00000001.json", root / "commits/00/u00000009.json")
    assert "doubled: " in found(root)

    root = damaged("torn")
    shard = next(root.rglob("u*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"torn: {shard.relative_to(root)}" in found(root)
    assert "torn: commits/00/" in found(root)

    root = damaged("foreign")
    (root / "latents" / "notes.txt").write_text("x")
    assert "is no file of a dataset" in found(root)
