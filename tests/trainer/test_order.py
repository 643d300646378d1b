"""Order: a permutation for every size and key, shards kept together, generators that know their parts."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.codec import checksum
from trainer.order import hash_strings, key_of, keyed_generator, keyed_order, keyed_shares, permutation

keys = st.integers(0, 2**64 - 1)


@settings(deadline=None)
@given(size=st.integers(0, 3000), key=keys)
def test_permutation_holds_every_number_once(size: int, key: int) -> None:
    assert sorted(permutation(size, key=key)) == list(range(size))


def test_orders_stay_as_they_were() -> None:
    """Others would be other steps, in the middle of a run too: then PLAN_VERSION has to be raised."""
    key = key_of("pinned")
    assert permutation(12, key=key).tolist() == [1, 0, 5, 4, 7, 8, 3, 11, 6, 9, 2, 10]
    assert checksum(permutation(1000, key=key).astype("<i8").tobytes()) == "crc32:a72d989a"
    assert keyed_order([3, 1, 2, 4, 1], key=key, group_shards=2).tolist() == [
        1,
        2,
        0,
        3,
        10,
        6,
        7,
        9,
        8,
        5,
        4,
    ]


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


@settings(deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40), max_size=20
    )
)
def test_hashes_depend_on_the_text_alone(texts: list[str]) -> None:
    hashes = hash_strings(pa.array(texts, pa.string()))
    alone = [hash_strings(pa.array([text, "x" * 99]))[0] for text in texts]
    assert hashes.tolist() == alone  # whatever else is hashed, and however long that is
    assert len(set(hashes.tolist())) == len(set(texts))
    assert hash_strings(pa.array(["other", *texts], pa.large_string()).slice(1)).tolist() == alone


def test_shares_are_uniform_and_each_turn_is_another_draw() -> None:
    hashes = hash_strings(pa.array([f"sample {i}" for i in range(20_000)]))
    draws = np.stack([keyed_shares(hashes, turns=turn, key=key) for turn in (0, 1) for key in (1, 2)])
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.stack([np.histogram(each, bins=20, range=(0, 1))[0] for each in draws])
    # 19 degrees of freedom: chi-squared above 57 has a chance of one in 100,000 (the draws are fixed).
    assert (((counts - 1000) ** 2 / 1000).sum(1) < 57).all()
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.03
    mixed = keyed_shares(hashes[:4], turns=np.array([0, 1, 0, 1]), key=1)
    assert mixed.tolist() == [draws[0, 0], draws[2, 1], draws[0, 2], draws[2, 3]]
