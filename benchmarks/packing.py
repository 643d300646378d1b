"""How full packs are and how busy ranks, by the trainer's plan and by what others do, as arithmetic.

Clips of 480 x 720 pixels at 8 frames/s through an encoder that keeps every fourth frame: 1350 tokens a latent
frame, and 226 of the prompt. What keeps a rank busy are the FLOPs of CogVideoX-5B; a step takes as long as
its dearest rank. Nothing is read and no model runs, so twenty thousand clips take seconds.

- `plan`: best fit into packs of the budget, packs of like cost in one step (`trainer.plan`), by window.
- `first come`: a pack takes clips in order until one does not fit; ranks take packs as they come.
- `sort all`: the whole epoch sorted before it is packed and grouped. The most that packing can give, at the
  price of an order that is no longer random.
- `pad to longest`, `pad in batch`: batches of budget / longest clips in order, each clip padded to the
  longest there is, or to the longest of its batch.
- `batch 1`: a clip a rank.
- `buckets`: as Open-Sora (https://github.com/hpcaitech/Open-Sora, opensora/datasets/bucket.py): a clip is cut
  to the longest bucket it reaches, and left out where it reaches none; a batch is as many clips of a bucket
  as the budget holds; what does not fill a batch is left out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import count as steps_from
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from benchmarks.models import architecture_of, clip_flops
from schemas.errors import ConfigError
from trainer.mixture import Visits
from trainer.order import key_of
from trainer.packing import plan_packs
from trainer.plan import Plan

TOKENS_A_FRAME, PROMPT = 1350, 226
FPS, TEMPORAL = 8, 4
CURRICULUM_S = (3, 9, 18, 30, 63)
LONGEST_S = 63.0
WINDOWS = (8, 32, 64, 128, 256, 512)
"""Of balancing, in packs."""
OURS = "plan, window 128"
"""As `data.balance_packs` has it unless set."""
GOALS = {"curriculum": 0.99, "lognormal": 0.99, "uniform": 0.985}
"""Fill, where the budget is twice the longest clip."""
GOAL_BUSY = 0.92


class Load(NamedTuple):
    """What one rank has to do in one step."""

    cost: float
    """FLOPs, padding included."""
    useful_cost: float
    useful_tokens: int


Loads = list[Load]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    lengths: str
    budget: int
    """In units of the longest clip."""
    way: str
    fill: float
    """Useful tokens of the budget of every rank and step."""
    busy: float
    """Share of the ranks' time that they do not wait for the dearest of their step."""
    useful: float
    """Share of the ranks' time that goes into tokens that are no padding."""
    kept: float
    """Share of the tokens there are that is trained on."""
    tokens_per_step: int
    """Useful ones, all ranks."""


def durations(lengths: str, count: int, *, seed: int) -> np.ndarray:
    """float [count]: seconds of clips, 63 at most."""
    draw = np.random.default_rng(key_of("bench packing", lengths, seed))
    if lengths == "curriculum":
        return draw.choice(CURRICULUM_S, count).astype(float)
    if lengths == "lognormal":
        return draw.lognormal(2.0, 0.8, count).clip(1.0, LONGEST_S)
    return draw.uniform(CURRICULUM_S[0], LONGEST_S, count)


def tokens_of(seconds: np.ndarray) -> np.ndarray:
    """int64 [n]: video and prompt tokens of clips."""
    frames = (seconds * FPS // TEMPORAL).astype(np.int64) + 1
    return frames * TOKENS_A_FRAME + PROMPT


@cache
def cost_of(tokens: int) -> float:
    """FLOPs of a clip in CogVideoX-5B."""
    return clip_flops(architecture_of("cogvideox-5b"), tokens=tokens, prompt=PROMPT).forward


def measure(count: int, *, ranks: int = 8, seed: int = 0, tell: Callable[[Row], None]) -> dict[str, Any]:
    """All lengths, budgets and ways with `count` clips; `tell` is called with every row as it comes."""
    least = max(WINDOWS) * ranks
    if count < least:
        raise ConfigError(f"--clips {count}: expected {least} or more, a few windows of packs")
    rows = []
    for lengths in GOALS:
        seconds = durations(lengths, count, seed=seed)
        for multiple in (1, 2):
            budget = multiple * int(tokens_of(np.array([LONGEST_S]))[0])
            for way, loads in contenders(seconds, budget=budget, ranks=ranks, seed=seed).items():
                row = summarize(loads, lengths, multiple, way, budget=budget, ranks=ranks, seconds=seconds)
                rows.append(row)
                tell(row)
    return {
        "clips": count,
        "ranks": ranks,
        "seed": seed,
        "planning_s_per_million": round(planning_seconds(), 2),
        "rows": [
            {
                name: round(value, 4) if isinstance(value, float) else value
                for name, value in asdict(row).items()
            }
            for row in rows
        ],
    }


def contenders(seconds: np.ndarray, *, budget: int, ranks: int, seed: int) -> dict[str, Loads]:
    """The packs or batches of every way, rank after rank, step after step; ours first."""
    tokens = tokens_of(seconds)
    found = {
        f"plan, window {window}": _planned(tokens, budget=budget, ranks=ranks, window=window)
        for window in WINDOWS
    }
    descending = np.sort(tokens)[::-1]
    packs = plan_packs(descending.tolist(), capacity=budget, open_bins=len(tokens))
    best = sorted((_load(descending[pack].tolist()) for pack in packs), reverse=True)
    size = max(1, budget // int(tokens.max()))
    batches = [tokens[i : i + size].tolist() for i in range(0, len(tokens), size)]
    return found | {
        "first come": [_load(pack) for pack in _next_fit(tokens.tolist(), budget)],
        "sort all": best,
        "pad to longest": [_load(batch, width=int(tokens.max())) for batch in batches],
        "pad in batch": [_load(batch, width=max(batch)) for batch in batches],
        "batch 1": [_load([length]) for length in tokens.tolist()],
        "buckets": _bucketed(seconds, budget=budget, seed=seed),
    }


def summarize(
    loads: Loads, lengths: str, multiple: int, way: str, *, budget: int, ranks: int, seconds: np.ndarray
) -> Row:
    """A line from loads; those of a last step that not all ranks take part in are left out."""
    steps = [loads[i : i + ranks] for i in range(0, len(loads) - ranks + 1, ranks)]
    time_ = ranks * sum(max(load.cost for load in step) for step in steps)
    tokens = sum(load.useful_tokens for step in steps for load in step)
    return Row(
        lengths=lengths,
        budget=multiple,
        way=way,
        fill=tokens / (ranks * budget * len(steps)),
        busy=sum(load.cost for step in steps for load in step) / time_,
        useful=sum(load.useful_cost for step in steps for load in step) / time_,
        kept=sum(load.useful_tokens for load in loads) / int(tokens_of(seconds).sum()),
        tokens_per_step=tokens // len(steps),
    )


def planning_seconds(count: int = 200_000) -> float:
    """Seconds that the plan of a million clips takes, from `count` of them."""
    tokens = tokens_of(durations("lognormal", count, seed=0))
    began = time.perf_counter()
    _planned_steps(tokens, budget=2 * int(tokens_of(np.array([LONGEST_S]))[0]), ranks=8, window=128)
    return (time.perf_counter() - began) * 1e6 / count


def _planned(tokens: np.ndarray, *, budget: int, ranks: int, window: int) -> Loads:
    steps = _planned_steps(tokens, budget=budget, ranks=ranks, window=window)
    return [_load(tokens[list(rows)].tolist()) for step in steps for rows in step]


def _planned_steps(
    tokens: np.ndarray, *, budget: int, ranks: int, window: int
) -> list[list[tuple[int, ...]]]:
    """The rows of each pack of each step of the first epoch."""
    visits = Visits(np.arange(len(tokens)), np.zeros(len(tokens), np.int64))
    lengths, at = np.unique(tokens, return_inverse=True)
    plan = Plan(
        lambda _: (visits, tokens),
        costs=np.array([cost_of(length) for length in lengths.tolist()])[at],
        key=("bench packing",),
        capacity=budget,
        slots=ranks,
        balance_packs=window,
    )
    epoch = takewhile(lambda step: all(pack.epoch == 0 for pack in step), map(plan.step, steps_from()))
    return [[pack.rows for pack in step] for step in epoch]


def _load(lengths: Sequence[int], *, width: int | None = None) -> Load:
    """Clips of `lengths` tokens, each padded to `width`."""
    useful = sum(map(cost_of, lengths))
    cost = useful if width is None else len(lengths) * cost_of(width)
    return Load(cost, useful, sum(lengths))


def _next_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    packs: list[list[int]] = [[]]
    room = budget
    for length in lengths:
        if length > room:
            packs.append([])
            room = budget
        packs[-1].append(length)
        room -= length
    return packs


def _bucketed(seconds: np.ndarray, *, budget: int, seed: int) -> Loads:
    """Batches of all buckets, in random order."""
    bounds = np.array(CURRICULUM_S, float)
    reached = np.searchsorted(bounds, seconds, side="right")
    loads = []
    for place, length in enumerate(tokens_of(bounds).tolist(), 1):
        size = budget // length
        loads += [_load([length] * size)] * (int((reached == place).sum()) // size)
    random.Random(seed).shuffle(loads)
    return loads
