"""Tables of positions: their type, and how many are kept."""

from __future__ import annotations

import torch

from trainer.positions import TableCache, rotary_table, sincos_table


def test_tables_are_float32() -> None:
    absolute = sincos_table((2, 4, 6), width=32, spatial_scale=1.875, temporal_scale=1.0)
    for table in (absolute, *rotary_table((2, 4, 6), head_dim=16, base=None)):
        assert (table.dtype, len(table)) == (torch.float32, 2 * 4 * 6)


def test_tables_are_kept_up_to_a_number_of_bytes_and_the_last_used_longest() -> None:
    cache, made = TableCache(limit=100), list[str]()

    def get(name: str, size: int = 10) -> torch.Tensor:
        def make() -> tuple[torch.Tensor]:
            made.append(name)
            return (torch.zeros(size),)

        return cache.get(name, make)[0]

    get("a")
    assert get("b") is get("b")
    get("a")
    get("c")  # 120 bytes: without b, which was used longest ago
    get("a")
    assert made == ["a", "b", "c"]
    get("b")
    assert made == ["a", "b", "c", "b"]
    assert len(get("large", 30)) == 30  # more than may be kept
    get("large", 30)
    get("a")
    assert made[4:] == ["large", "large", "a"]
