"""The plan: exactly once an epoch, whatever is asked for first, in packs of like cost."""

from __future__ import annotations

import gc
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.mixture import DatasetOrder, Visits
from trainer.plan import LINEAR_COST, PackPlan, Plan, Step, rank_share

BALANCE_PACKS = 128


def make_plan(
    lengths: list[int],
    *,
    slots: int,
    seed: int = 0,
    capacity: int = 100,
    weight: float = 1.0,
    balance_packs: int = BALANCE_PACKS,
) -> Plan:
    """Shards of unequal sizes: 1, 2, 3, ..."""
    count, tokens = len(lengths), np.array(lengths)
    shards = np.repeat(np.arange(count), np.arange(1, count + 1))[:count]
    order = DatasetOrder(np.arange(count), shards=shards, weight=Fraction(str(weight)), key=seed)

    def epoch(number: int) -> tuple[Visits, np.ndarray]:
        assert number < 500, "epochs go by and make no step"
        visits = order.epoch(number)
        return visits, tokens[visits.rows]

    return Plan(
        epoch,
        costs=tokens * (tokens + LINEAR_COST),
        key=("dataset", "stage", seed),
        capacity=capacity,
        slots=slots,
        balance_packs=balance_packs,
    )


def visits(steps: list[Step]) -> Counter[tuple[int, int]]:
    return Counter((pack.epoch, row) for step in steps for pack in step for row in pack.rows)


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    slots=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_every_epoch_holds_every_sample_once(lengths: list[int], slots: int, seed: int) -> None:
    plan = make_plan(lengths, slots=slots, seed=seed)
    steps: list[Step] = []
    while not steps or steps[-1][-1].epoch < 3:
        steps.append(plan.step(len(steps)))
        assert len(steps[-1]) == slots
        assert all(sum(lengths[row] for row in pack.rows) <= 100 for pack in steps[-1])
    # Epochs 0 to 2 are over, but for fewer packs than make a step: those come with epoch 3.
    missing = {(epoch, row) for epoch in range(3) for row in range(len(lengths))} - visits(steps).keys()
    late: list[Step] = []
    while missing - visits(late).keys():
        assert len(late) < BALANCE_PACKS, "a sample was dropped"
        late.append(plan.step(len(steps) + len(late)))
    assert sum(pack.epoch < 3 for step in late for pack in step) < slots
    assert all(pack.passes == (pack.epoch,) * len(pack.rows) for step in steps for pack in step)
    assert set(visits(steps + late).values()) == {1}, "a sample came twice in one epoch"


def test_packs_left_over_join_the_next_epoch() -> None:
    plan = make_plan([100] * 7, slots=3)  # 7 packs an epoch: 1 is left over, then 2, then none

    def epochs(first: int, last: int) -> Counter[int]:
        return Counter(pack.epoch for step in range(first, last) for pack in plan.step(step))

    assert [epochs(0, 2), epochs(2, 4), epochs(4, 7)] == [{0: 6}, {0: 1, 1: 5}, {1: 2, 2: 7}]


def test_any_step_in_any_order_gives_the_same() -> None:
    lengths = [random.Random(0).randint(5, 90) for _ in range(50)]
    forward = make_plan(lengths, slots=2)
    steps = [forward.step(step) for step in range(80)]
    assert steps[-1][0].epoch >= 2
    for step in (79, 3, 41, 0, 60, 59):
        assert forward.step(step) == steps[step]
        assert make_plan(lengths, slots=2).step(step) == steps[step]


def test_a_plan_remembers_a_bounded_number_of_steps() -> None:
    def held() -> int:
        return sum(type(each) is PackPlan for each in gc.get_objects())

    plan, before = make_plan([100] * 2000, slots=1), held()
    asked = [1900, 1899, 1885, 1884, 0, 700]
    steps = {step: pack for step in range(1901) for pack in plan.step(step) if step in asked}
    assert len(steps) == len(asked)
    assert held() - before < 2 * BALANCE_PACKS
    assert {step: plan.step(step)[0] for step in asked} == steps


def test_seeds_and_epochs_put_other_clips_together() -> None:
    plan, other = make_plan([10] * 100, slots=1), make_plan([10] * 100, slots=1, seed=1)

    def packs(plan: Plan, first: int) -> set[frozenset[int]]:
        return {frozenset(plan.step(step)[0].rows) for step in range(first, first + 10)}

    runs = [packs(plan, 0), packs(plan, 10), packs(other, 0)]
    assert [sorted(row for pack in run for row in pack) for run in runs] == [list(range(100))] * 3
    assert not runs[0] & runs[1] | runs[1] & runs[2] | runs[2] & runs[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_a_step_without_overlap(world_size: int) -> None:
    step = [PackPlan(0, (row,), (0,), cost=8 - row) for row in range(8)]
    shares = [rank_share(step, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {8 // world_size}
    assert sorted(pack.rows for share in shares for pack in share) == [pack.rows for pack in step]
    # What ranks run at the same time are neighbours in cost.
    assert [pack.rows[0] for share in shares for pack in share[:1]] == list(range(world_size))


def test_packs_of_a_step_cost_about_the_same() -> None:
    draw = random.Random(0)
    lengths = [1350 * draw.choice([7, 19, 37, 61, 127]) + 226 for _ in range(3000)]
    plan = make_plan(lengths, slots=8, capacity=2 * max(lengths))
    packs, fill = plan.epoch_size()
    assert fill > 0.985

    def cost(pack: PackPlan) -> float:
        return sum(lengths[row] ** 2 + 18432.0 * lengths[row] for row in pack.rows)

    steps = [[cost(pack) for pack in plan.step(step)] for step in range(packs // 8)]
    busy = sum(map(sum, steps)) / sum(8 * max(step) for step in steps)
    assert busy > 0.92
    assert all([pack.cost for pack in plan.step(step)] == costs for step, costs in enumerate(steps))
    window = [max(step) for step in steps[: BALANCE_PACKS // 8]]
    assert sorted(window) != window != sorted(window, reverse=True), "steps must not run from cheap to dear"
    alone = make_plan(lengths, slots=8, capacity=2 * max(lengths), balance_packs=8)
    as_they_come = [[pack.cost for pack in alone.step(step)] for step in range(packs // 8)]
    assert sum(map(sum, as_they_come)) / sum(8 * max(step) for step in as_they_come) < 0.85


def test_epoch_size_counts_what_the_epoch_takes() -> None:
    plan = make_plan([30] * 31, slots=1)
    packs, fill = plan.epoch_size()
    assert packs == 11
    assert fill == pytest.approx(31 * 30 / 1100)
    assert [plan.step(step)[0].epoch for step in (0, 10, 11)] == [0, 0, 1]
