"""The attention benchmark: its packs, its filters, and that what fails is told beside what was measured."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention import HEAD_DIMS, MIX, Row, main, measure, packs, table
from trainer import routes
from trainer.attention import sdpa_cross

CPU = torch.device("cpu")


def rows(**filters: Any) -> list[Row]:
    return list(measure(device=CPU, shrink=5000, seconds=0.0, **filters))


def test_packs_hold_the_curriculum() -> None:
    made = packs()
    assert made["63 s"] == [253 * 1350 + 226]
    assert len(made["3 s"]) == 19
    assert [length // 1350 for length in made[MIX]] == [13, 37, 73, 121]
    assert all(sum(lengths) <= sum(made["63 s"]) for lengths in made.values())


def test_every_route_is_measured_or_said_to_fail() -> None:
    found = rows()
    assert len(found) == 2 * len(HEAD_DIMS) * len(routes.ROUTES) * len(packs())
    works = {row.route for row in found if not row.failed}
    assert works == {"sdpa"}
    assert all((row.forward or 0) > 0 < (row.both or 0) for row in found if row.route in works)
    lines = table(found)
    assert [line[:32].strip() for line in lines[1:]] == [
        f"{route} {head_dim}{end}"
        for end, head_dim, route in itertools.product(("", ", deterministic"), HEAD_DIMS, routes.ROUTES)
    ]
    assert lines[1].split()[-1] == "-"
    assert float(lines[5].split()[-1]) > 0


def test_a_cell_that_fails_is_told_and_the_next_ones_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = packs(shrink=5000)["63 s"]

    def short_of_memory(*inputs: Any) -> torch.Tensor:
        if len(inputs[0]) == sum(longest):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sdpa_cross(*inputs)

    monkeypatch.setitem(routes.ROUTES, "sdpa", lambda: short_of_memory)
    found = rows(routes=["sdpa"], head_dims=[64], deterministic=[False], kinds=["63 s", "3 to 30 s"])
    assert [bool(row.forward) for row in found] == [False, True]
    assert found[0].failed == "OutOfMemoryError: CUDA out of memory"


def test_no_time_left_begins_nothing() -> None:
    assert rows(minutes=-1.0) == []


def test_what_is_asked_for_is_printed_and_recorded_row_by_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["--route", "sdpa", "--head", "64", "--pack", "9 s", "--pack", "3 s", "--deterministic", "no"]
    main(only, results=tmp_path)
    recorded = [json.loads(line) for line in (tmp_path / "attention.jsonl").read_text().splitlines()]
    assert recorded[0]["matmul_tflops"] > 0
    assert [(row["route"], row["head_dim"], row["pack"]) for row in recorded[1:]] == [
        ("sdpa", 64, "9 s"),
        ("sdpa", 64, "3 s"),
    ]
    assert all(row["deterministic"] is False and row["both"] > 0 for row in recorded[1:])
    assert "sdpa 64                         9 s" in capsys.readouterr().out
