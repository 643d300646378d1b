"""Packing loses nothing, doubles nothing, never overfills and fills well; packs refuse what disagrees."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.packing import Pack, Segment, iter_packs, plan_packs


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=300),
    capacity=st.integers(50, 130),
    open_bins=st.integers(1, 9),
)
def test_every_position_is_in_one_pack_and_no_pack_overflows(
    lengths: list[int], capacity: int, open_bins: int
) -> None:
    packs = plan_packs(lengths, capacity=capacity, open_bins=open_bins)
    assert sorted(position for pack in packs for position in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[position] for position in pack) <= capacity for pack in packs)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=300))
def test_at_most_one_pack_is_half_empty(lengths: list[int]) -> None:
    # Two packs that are at most half full would have been one, as long as both are open at the same time.
    sums = [sum(lengths[i] for i in pack) for pack in plan_packs(lengths, capacity=100, open_bins=300)]
    assert sum(total <= 50 for total in sums) <= 1


def test_curriculum_lengths_fill_99_percent_of_twice_the_longest() -> None:
    draw = random.Random(0)
    frames = [draw.choice([7, 19, 37, 61, 127]) for _ in range(4000)]
    lengths = [1350 * n + 226 for n in frames]
    capacity = 2 * max(lengths)
    packs = plan_packs(lengths, capacity=capacity)
    assert sum(lengths) / (len(packs) * capacity) > 0.99


def test_packs_come_while_lengths_are_still_read() -> None:
    lengths = iter([60] * 100)  # no two fit together: the fourth is one bin too many
    assert next(iter_packs(lengths, capacity=100, open_bins=3)) == [0]
    assert len(list(lengths)) == 96


def test_the_last_packs_are_packed_again_longest_first() -> None:
    # In this order best fit needs three bins of 10; longest first needs two.
    assert len(plan_packs([3, 3, 2, 5, 7], capacity=10)) == 2


@pytest.mark.parametrize("length", [0, 11])
def test_a_length_that_fits_no_pack_is_named(length: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.10, found length = {length} at position = 1"):
        plan_packs([3, length], capacity=10)


def segment(channels: int = 4, width: int = 8, dtype: torch.dtype = torch.float32) -> Segment:
    latents = torch.zeros(3, channels, 4, 6, dtype=dtype)
    return Segment(sample_id="abc", key="k", latents=latents, prompt_embeds=torch.zeros(5, width))


def test_repr_shows_shapes_and_no_values() -> None:
    assert repr(Pack((segment(),))) == "Pack(Segment(abc, latents=(3, 4, 4, 6), prompt_embeds=(5, 8)))"


def test_segments_check_rank_and_dtype() -> None:
    with pytest.raises(ValueError, match=r"latents of abc: expected 4 .* float32, found torch\.float16"):
        segment(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"prompt_embeds of abc: expected 2 .*\(5,\)"):
        Segment(sample_id="abc", key="k", latents=torch.zeros(1, 4, 2, 2), prompt_embeds=torch.zeros(5))


@pytest.mark.parametrize("other", [segment(channels=8), segment(width=9)], ids=repr)
def test_packs_check_that_segments_agree(other: Segment) -> None:
    with pytest.raises(ValueError, match="one channel count and one prompt width"):
        Pack((segment(), other))


def test_an_empty_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="in 0 segments"):
        Pack(())
