"""The attention benchmark: its packs, and that a route it measures is one that works here."""

from __future__ import annotations

import torch

from benchmarks.attention import HEADS, measure, packs, table


def test_packs_hold_the_curriculum() -> None:
    made = packs()
    assert made["63 s"] == [253 * 1350 + 226]
    assert len(made["3 s"]) == 19
    assert [length // 1350 for length in made["3 to 30 s"]] == [13, 37, 73, 121]
    assert all(sum(lengths) <= sum(made["63 s"]) for lengths in made.values())


def test_every_route_is_measured_or_said_to_fail() -> None:
    numbers = measure(device=torch.device("cpu"), shrink=5000, seconds=0.0)
    assert {row["route"] for row in numbers["rows"]} == {"sdpa"}
    assert len(numbers["rows"]) == 2 * len(HEADS) * len(packs())
    assert all(row["forward"] > 0 < row["both"] for row in numbers["rows"])
    assert set(numbers["passed_over"]) == {"flash_attn_3", "varlen", "flash_attn_2", "flex"}
    lines = table(numbers)
    assert lines[1].startswith("sdpa 64 ")
    assert lines[3].startswith("sdpa 64, deterministic")
