"""`make faults`: every fault of this folder, at every call and at random times; a table of what came of it.

Out: one line per event that went wrong, the table, and exit code 1 if anything was lost, doubled, torn or
different, or if fewer than 200 kills met their process. Two processes share the events.
"""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import events
from tests.faults.disks import power_cuts
from tests.faults.events import Ground, Outcome
from tests.faults.taps import Plan

LEAST_KILLS = 200
PROCESSES = 2
_PROBLEMS = ("lost", "doubled", "torn", "different")

_folder = Path()
_grounds: dict[str, Ground] = {}


@dataclass(frozen=True)
class Event:
    """A function of `events` and its arguments; power cuts are named by their number."""

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


def plan_events(ground: Ground, seed: int) -> Iterator[Event]:
    """All events, the slow ones first."""
    rng = random.Random(seed)
    calls = range(len(ground.ops))
    yield Event("stopped", {"plan": Plan(at=_first_record(ground), action="stop"), "asleep_s": 60.0})
    for target, count in (
        ("actor", 14),
        ("raylet", 8),
        ("driver", 6),
        ("decoder", 5),
        ("gcs", 4),
        ("tree", 4),
    ):
        for i in range(count):
            committed = rng.random() < 0.6
            after_s = rng.uniform(0, 0.4) if committed else rng.uniform(0, 4)
            arguments = {"target": target, "committed": committed, "after_s": after_s}
            yield Event("on_ray", {**arguments, "resume_on_ray": i == 0})

    for at in calls:
        for action in ("before", "half", "after") if ground.ops[at].kind == "write" else ("before", "after"):
            yield Event("at_call", {"plan": Plan(at=at, action=action)})
    for target, count in (("driver", 60), ("tree", 30), ("decoder", 40)):
        for _ in range(count):
            limit = 0.35 if target == "decoder" else 1.05 * ground.seconds
            yield Event("at_time", {"target": target, "after_s": rng.uniform(0, limit)})

    for error, lasts in ((errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, True), (errno.EROFS, True)):
        for at in calls:
            yield Event("at_call", {"plan": Plan(at=at, action="error", error=error, lasts=lasts)})
    if events.can_mount(_folder):
        for kib in range(8, 264, 12):
            yield Event("full_disk", {"kib": kib})
        for plan in (None, *(Plan(at=at) for at in calls[::10])):
            yield Event("read_only_disk", {"plan": plan})
    else:
        print("no tmpfs here: this process may not mount; the injected errors stand alone")

    for at in calls:
        yield Event("stopped", {"plan": Plan(at=at, action="stop"), "asleep_s": 0.0})
    for _ in range(30):
        apart_s, kill_after_s = rng.uniform(0, ground.seconds), rng.uniform(0, ground.seconds)
        yield Event("two_drivers", {"apart_s": apart_s})
        yield Event("two_drivers", {"apart_s": apart_s / 2, "kill_after_s": kill_after_s / 2})
    for at in calls:
        yield Event("resumed", {"at": at})
    for number, _ in enumerate(power_cuts(ground.ops)):
        yield Event("power_cut", {"number": number})


def _first_record(ground: Ground) -> int:
    """The call that would give the first latents unit its record: its shard has its name by then."""
    return next(i for i, op in enumerate(ground.ops) if op.kind == "link" and "commits/00/u" in op.target)


def _ground(name: str) -> Ground:
    """This process's own, made when it is first needed."""
    if name not in _grounds:
        folder = Path(tempfile.mkdtemp(dir=_folder))
        size = {"num_clips": 24, "unit_rows": 1} if name == "ray" else {}
        _grounds[name] = Ground(folder / "ground", **size)
    return _grounds[name]


def _enter(folder: Path) -> None:
    global _folder
    _folder = folder


def _run(event: Event) -> Outcome:
    ground = _ground("ray" if event.function == "on_ray" else "plain")
    arguments = event.arguments
    if event.function == "power_cut":
        cuts = list(power_cuts(ground.ops))
        call, state = cuts[min(arguments["number"], len(cuts) - 1)]
        arguments = {"number": call, "state": state}
    outcome: Outcome = getattr(events, event.function)(ground, **arguments)
    return outcome


def print_table(outcomes: list[Outcome]) -> None:
    """Events by kind, as a Markdown table."""
    columns = ("event", "times", "kills", "finished", "stopped", *_PROBLEMS, "other", "orphans")
    print("| " + " | ".join(columns) + " |\n|---" + "|---:" * (len(columns) - 1) + "|")
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    for kind in [*kinds, "all"]:
        those = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        endings = [sum(outcome.ended == ending for outcome in those) for ending in ("finished", "stopped")]
        problems = [{text.partition(":")[0] for text in outcome.problems} for outcome in those]
        counts = [sum(name in found for found in problems) for name in _PROBLEMS]
        other = sum(bool(found - set(_PROBLEMS)) for found in problems)
        kills, orphans = sum(outcome.kills for outcome in those), sum(outcome.orphans for outcome in those)
        row = (kind, len(those), kills, *endings, *counts, other, orphans)
        print("| " + " | ".join(map(str, row)) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    parser.add_argument("--only", default="", help="events of one function, such as on_ray")
    parser.add_argument("--every", type=int, default=1, help="every n-th event")
    arguments = parser.parse_args()
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="latentpress-faults-") as name:
        _enter(Path(name))
        todo = [
            event
            for event in plan_events(_ground("plain"), arguments.seed)
            if arguments.only in event.function
        ][:: arguments.every]
        outcomes: list[Outcome] = []
        with ProcessPoolExecutor(PROCESSES, context, initializer=_enter, initargs=(Path(name),)) as pool:
            running = [pool.submit(_run, event) for event in todo]
            for future in as_completed(running):
                outcome = future.result()
                outcomes.append(outcome)
                for problem in outcome.problems:
                    print(f"{outcome.kind}, {outcome.where}: {problem}", flush=True)
                if len(outcomes) % 50 == 0:
                    print(f"{len(outcomes)}/{len(todo)} {time.monotonic() - started:.0f} s", file=sys.stderr)
    print_table([future.result() for future in running])
    kills = sum(outcome.kills for outcome in outcomes)
    bad = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"\n{len(outcomes)} events, {kills} kills, {bad} with problems, {time.monotonic() - started:.0f} s")
    whole = not arguments.only and arguments.every == 1
    return int(bool(bad) or (whole and kills < LEAST_KILLS))


if __name__ == "__main__":
    sys.exit(main())
