"""Quantiles from bins: within one per cent of the sorted values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.histogram import Histogram

VALUES = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e6)), min_size=1, max_size=200)


def filled(values: list[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


@given(VALUES, st.floats(0, 1))
def test_quantiles_are_within_one_per_cent(values: list[float], share: float) -> None:
    position = share * (len(values) - 1)
    low, high = (sorted(values)[math.floor(position)], sorted(values)[math.ceil(position)])
    exact = low + position % 1 * (high - low)
    assert filled(values).quantile(share) == pytest.approx(exact, rel=0.01, abs=1e-12)


@given(VALUES)
def test_least_greatest_and_sum_are_exact(values: list[float]) -> None:
    histogram = filled(values)
    assert (histogram.min, histogram.max, histogram.count) == (min(values), max(values), len(values))
    assert histogram.sum == pytest.approx(math.fsum(values), rel=1e-12)


def test_common_values_are_themselves() -> None:
    spread = filled([24.0] * 5 + [25.0] * 2 + [720.0])
    assert spread.spread() == {"min": 24, "p10": 24, "median": 24, "p90": 233.5, "max": 720, "sum": 890}
    assert Histogram().spread() is None


def test_a_million_values_cost_no_more_than_a_thousand() -> None:
    histogram = filled([1.001**i for i in range(5000)])
    assert len(histogram._bins) < 600


def test_an_array_at_once_is_the_same_as_its_values_one_by_one() -> None:
    values = np.concatenate([np.random.default_rng(0).lognormal(1, 2, 1000), np.zeros(7)])
    one_by_one, at_once = filled(values.tolist()), Histogram()
    for part in np.split(values, [0, 10, 600]):
        at_once.add_all(part)
    assert at_once.count == one_by_one.count == 1007
    assert at_once.spread() == pytest.approx(one_by_one.spread())
    assert at_once.bars(30) == one_by_one.bars(30)


def test_bars_hold_every_value_above_zero_in_its_place() -> None:
    values = [0.0, 1.0, 1.0, 24.0, 25.0, 60.0]
    edges, counts = filled(values).bars(20)
    assert len(counts) == len(edges) - 1 <= 20
    assert sum(counts) == 5
    assert edges[0] <= 1 <= edges[1]
    assert edges[-2] <= 60 <= edges[-1]
    assert counts[0] == 2
    assert Histogram().bars(20) == ([], [])
