"""Quantiles from bins: within one per cent of the sorted values."""

from __future__ import annotations

import math

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
