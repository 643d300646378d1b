"""Order: a permutation for every size and key, shards kept together, generators that know their parts."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.order import key_of, keyed_generator, keyed_order, permutation

keys = st.integers(0, 2**64 - 1)


@settings(deadline=None)
@given(size=st.integers(0, 3000), key=keys)
def test_permutation_holds_every_number_once(size: int, key: int) -> None:
    assert sorted(permutation(size, key=key)) == list(range(size))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40), key=keys, group=st.integers(1, 8))
def test_keyed_order_holds_every_row_once(sizes: list[int], key: int, group: int) -> None:
    order = keyed_order(sizes, key=key, group_shards=group)
    assert sorted(order) == list(range(sum(sizes)))


@settings(deadline=None)
@given(key=keys)
def test_samples_mix_inside_groups_of_shards_only(key: int) -> None:
    shard_of = np.repeat(np.arange(12), 10)[keyed_order([10] * 12, key=key, group_shards=4)]
    groups = shard_of.reshape(3, 40)
    assert all(len(set(group)) == 4 for group in groups)
    assert any(len(set(group[:10])) > 1 for group in groups)


def test_small_permutations_are_uniform() -> None:
    counts = Counter(tuple(permutation(4, key=key_of("uniform", draw))) for draw in range(4800))
    assert set(counts) == set(permutations(range(4)))
    # 23 degrees of freedom: chi-squared above 63 has a chance of one in 100,000 (the keys are fixed).
    assert sum((seen - 200) ** 2 / 200 for seen in counts.values()) < 63


def test_another_key_gives_another_order() -> None:
    first, again, other = (permutation(500, key=key) for key in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_keyed_generators_depend_on_every_part_and_on_where_it_ends() -> None:
    def draw(*parts: str | int) -> tuple[float, ...]:
        return tuple(torch.randn(4, generator=keyed_generator(*parts)).tolist())

    assert draw(0, "a") == draw(0, "a")
    assert len({draw(0, "a"), draw(1, "a"), draw(0, "b"), draw("a", 0), draw("0a"), draw("0", "a", "")}) == 6
