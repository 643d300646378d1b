"""The mixture: exactly as many visits as the weights say, whatever else is in it."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.bucket import Geometry
from schemas.errors import ConfigError
from schemas.scaling import Scaling
from tests.trainer.catalogs import Clip, make_catalog
from trainer.mixture import DatasetOrder, Mixture, Visits, mixed

WEIGHTS = st.sampled_from(["0.1", "0.5", "1", "1.5", "2", "2.25", "0.3333"])


def order_of(count: int, weight: str, *, seed: int = 0, first: int = 0) -> DatasetOrder:
    shards = np.sort(np.arange(count) % 5)
    return DatasetOrder(np.arange(first, first + count), shards=shards, weight=Fraction(weight), key=seed)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 40), weight=WEIGHTS, seed=st.integers(0, 9), epochs=st.integers(1, 12))
def test_a_weight_is_the_visits_of_an_epoch(count: int, weight: str, seed: int, epochs: int) -> None:
    order = order_of(count, weight, seed=seed)
    visited = [order.epoch(epoch) for epoch in range(epochs)]
    pairs = [pair for rows, passes in visited for pair in zip(rows.tolist(), passes.tolist(), strict=True)]
    assert len(set(pairs)) == len(pairs), "a sample came twice in one pass"
    assert [turn for _, turn in pairs] == sorted(turn for _, turn in pairs)
    exact = epochs * Fraction(weight)
    assert len(pairs) == int(exact * count)
    times = Counter(row for row, _ in pairs)
    assert all(math.floor(exact) <= times[row] <= math.ceil(exact) for row in range(count))


def test_passes_differ_in_order() -> None:
    order = order_of(40, "2")
    rows = order.epoch(0).rows.tolist()
    assert sorted(rows[:40]) == sorted(rows[40:]) == list(range(40))
    assert rows[:40] != rows[40:]


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4), key=st.integers(0, 99))
def test_a_mixed_epoch_keeps_the_order_of_each_dataset(sizes: list[int], key: int) -> None:
    parts = [Visits(np.arange(n) + 100 * i, np.full(n, i)) for i, n in enumerate(sizes)]
    rows, passes = mixed(parts, key=key)
    assert [rows[passes == i].tolist() for i in range(len(sizes))] == [part.rows.tolist() for part in parts]
    assert len(rows) == sum(sizes)


def test_datasets_are_spread_over_an_epoch() -> None:
    rows, _ = mixed([order_of(200, "1").epoch(0), order_of(100, "1", first=1000).epoch(0)], key=3)
    shares = [(rows[at : at + 60] >= 1000).mean() for at in range(0, 300, 60)]
    assert 0.15 < min(shares) <= max(shares) < 0.55


@settings(deadline=None, max_examples=40)
@given(captions=st.lists(st.integers(1, 5), min_size=1, max_size=20), seed=st.integers(0, 9))
def test_by_lot_a_pass_visits_each_clip_once_and_all_passes_each_caption(
    captions: list[int], seed: int
) -> None:
    clip_of = np.repeat(np.arange(len(captions)), captions)
    order = DatasetOrder(
        np.arange(len(clip_of)),
        shards=np.zeros(len(clip_of), np.int64),
        weight=Fraction(1),
        key=seed,
        clips=clip_of.astype(np.uint64),
    )
    passes = [order.epoch(epoch).rows for epoch in range(max(captions))]
    assert all(sorted(clip_of[rows].tolist()) == list(range(len(captions))) for rows in passes)
    assert set(np.concatenate(passes).tolist()) == set(range(len(clip_of)))
    for clip, count in enumerate(captions):  # and by turns: so many passes, so many captions
        own = [row for rows in passes[:count] for row in rows.tolist() if clip_of[row] == clip]
        assert len(set(own)) == count


def test_the_first_caption_is_drawn() -> None:
    clips = np.repeat(np.arange(400, dtype=np.uint64), 2)
    order = DatasetOrder(
        np.arange(800),
        shards=np.zeros(800, np.int64),
        weight=Fraction(1),
        key=5,
        clips=clips * np.uint64(7919),
    )
    assert 150 < (order.epoch(0).rows % 2).sum() < 250


def test_datasets_that_mean_other_numbers_are_refused(tmp_path: Path) -> None:
    clips = [Clip(5)]
    first = make_catalog(tmp_path / "first", clips)
    Mixture([first, make_catalog(tmp_path / "alike", clips, seed=1)])
    for name, catalog, message in (
        (
            "scaled",
            make_catalog(tmp_path / "scaled", clips, scaling=Scaling(rule="factor", factor=0.5)),
            "scaling is {'factor': 0.5",
        ),
        (
            "encoded otherwise",
            make_catalog(
                tmp_path / "pieces",
                clips,
                geometry=Geometry(temporal=4, spatial=8, channels=16, segment_frames=5),
            ),
            "geometry is Geometry.*segment_frames=5",
        ),
        ("wide", make_catalog(tmp_path / "wide", clips, prompt_width=9), "prompts are 9 and 8 wide"),
        ("long", make_catalog(tmp_path / "long", clips, prompt_rows=512), "max_length is 512 and 226"),
    ):
        with pytest.raises(ConfigError, match=f"cannot be trained on together: .*{message}"):
            Mixture([first, catalog])
        assert name


def test_rows_are_numbered_dataset_by_dataset(tmp_path: Path) -> None:
    catalogs = [make_catalog(tmp_path / str(count), [Clip(5)] * count, seed=count) for count in (2, 3, 1)]
    mixture = Mixture(catalogs)
    assert [mixture.locate(row) for row in range(len(mixture))] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (1, 2),
        (2, 0),
    ]
    assert mixture.sample_id(4) == catalogs[1].sample_id(2)
