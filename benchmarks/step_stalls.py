"""What holds training up: a model in training in; the share of its time that saves, and waiting, take out.

A save costs what training stands still for, and what it slows the steps that run beside it; the second is
found by taking steps until the checkpoint is whole. Both are held against steps with nothing beside them.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.step_model import Bench
from benchmarks.step_ways import PACKED, plan_ways
from trainer.checkpoint import KEYS, checkpoints_folder, newest
from trainer.feed import feed
from trainer.loader import open_loader
from trainer.mixture import Mixture
from trainer.parallel import World
from trainer.saver import Saver

GOAL_SAVE, GOAL_WAIT = 0.02, 0.01
SAVE_EVERY = 500
_META: dict[str, Any] = dict.fromkeys(key for key in KEYS if key not in ("step", "files"))
"""Nothing resumes from these."""
_MOST_STEPS = 1000
"""Beside one save: one that fails is never there to be seen, and is told of after them."""


def saves(bench: Bench, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Seconds that a save takes from training, and their share of it at one every SAVE_EVERY steps; None, and
    says so, where two checkpoints have no room on disk."""
    world, settings = bench.world, bench.settings
    state = 3 * 4 * sum(parameter.numel() for parameter in bench.model.parameters())  # AdamW's moments too
    free = world.on_main(lambda: shutil.disk_usage(tempfile.gettempdir()).free)
    if free < 2.1 * state:
        say(
            f"  saves are left out: {2.1 * state / 1e9:.0f} GB are needed in {tempfile.gettempdir()}, "
            f"{free / 1e9:.0f} GB are free; set TMPDIR"
        )
        return None
    way = plan_ways(settings, rank=world.dp_rank, ranks=world.dp_size)[PACKED]
    batches = bench.batches([bench.pack(clips) for clips in way])
    alone = statistics.median(bench.step(batches) for _ in range(settings.reps))
    found: dict[str, Any] = {"step_s": round(alone, 4), "every": SAVE_EVERY}
    for name, background in (("background", True), ("foreground", False)):
        blocked, costs = [], []
        with (
            _shared_folder(world) as output,
            Saver(output, world=world, keep=1, background=background) as saver,
        ):
            for number in range(1, settings.saves + 1):
                began = time.perf_counter()
                saver.save(number, model=bench.model, optimizer=bench.optimizer, meta=_META)
                blocked.append(time.perf_counter() - began)
                steps = 0
                while background and steps < _MOST_STEPS and not (steps and _is_whole(output, number, world)):
                    bench.step(batches)
                    steps += 1
                saver.wait()
                costs.append(time.perf_counter() - began - steps * alone)
        cost = max(0.0, statistics.median(costs))
        found[name] = {
            "blocked_s": round(statistics.median(blocked), 4),
            "cost_s": round(cost, 4),
            "share": round(cost / (SAVE_EVERY * alone + cost), 5),
        }
    return found


def _is_whole(output: Path, number: int, world: World) -> bool:
    """Whether the checkpoint is on disk; the same on all ranks, which take steps together."""

    def look() -> bool:
        saved = newest(checkpoints_folder(output))
        return saved is not None and saved.step == number

    return world.on_main(look)


@contextmanager
def _shared_folder(world: World) -> Iterator[Path]:
    """A temporary folder of the first rank."""
    folder = world.on_main(lambda: tempfile.mkdtemp(prefix="latentpress-bench-"))
    try:
        yield Path(folder)
    finally:
        world.barrier()
        if world.is_main:
            shutil.rmtree(folder)


def waiting(bench: Bench) -> dict[str, Any]:
    """Share of the time of steps on a real dataset that waits for their batches, after the first step."""
    world = bench.world
    waits, seconds = [], []
    mixture = Mixture.of(bench.config.mixture)
    with open_loader(bench.config, mixture, architecture=bench.architecture, world=world) as loader:
        steps = feed(
            loader,
            steps=range(bench.settings.loader_steps),
            architecture=bench.architecture,
            objective=bench.objective,
            world=world,
            ahead=True,
        )
        began = time.perf_counter()
        for data in steps:
            waits.append(time.perf_counter() - began)
            bench.step(data.batches)
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
    return {
        "steps": len(waits),
        "step_s": round(statistics.median(seconds[1:]), 4),
        "first_wait_s": round(waits[0], 4),
        "waiting": round(sum(waits[1:]) / sum(seconds[1:]), 5),
    }
