"""`latentpress bench train` and `bench packing` on little work: all numbers promised, and fair ways."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.packing import CURRICULUM_S, OURS, contenders, durations, summarize, tokens_of
from benchmarks.step_ways import IN_BATCH, ONE, PACKED, PADDED, StepSettings, plan_ways
from jobs.bench_packing import packing
from jobs.bench_train import settings, train
from schemas.errors import ConfigError
from tests.trainer.datasets import write_dataset

TINY = {
    "model": "tiny",
    "durations": "1,2,5",
    "height": 16,
    "width": 32,
    "prompt_tokens": 3,
    "dtype": "float32",
    "layers": 1,
    "reps": 1,
    "saves": 1,
}


def step_settings(**changed: object) -> StepSettings:
    return settings(**(TINY | {"budget": 2, "packs": 2} | changed))


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_way_trains_on_the_same_clips(ranks: int) -> None:
    chosen = step_settings(packs=3)
    shares = [plan_ways(chosen, rank=rank, ranks=ranks) for rank in range(ranks)]
    clips = {
        name: Counter(clip[0] for share in shares for batch in share[name] for clip in batch)
        for name in shares[0]
    }
    assert len(clips[PACKED]) == 3
    for name in (PADDED, IN_BATCH, ONE):
        left_out = clips[PACKED] - clips[name]
        assert not clips[name] - clips[PACKED]
        assert left_out.total() == 0 if ranks == 1 else left_out.total() <= 8
    for share in shares:
        assert {name: len(way) for name, way in share.items()} == {n: len(w) for n, w in shares[0].items()}
        assert all(sum(chosen.tokens(s) for s, _ in pack) <= 2 * chosen.tokens(5.0) for pack in share[PACKED])
        assert all(width == 5.0 for batch in share[PADDED] for _, width in batch)
        assert all(width == max(s for s, _ in batch) for batch in share[IN_BATCH] for _, width in batch)


def test_a_step_bench_leaves_all_its_numbers(tmp_path: Path) -> None:
    numbers, chart = tmp_path / "numbers.json", tmp_path / "chart.png"
    code = train(step_settings(), nproc=1, json_path=numbers, plot_path=chart, results=tmp_path)
    assert code == 0
    found = json.loads(numbers.read_text())
    assert chart.read_bytes().startswith(b"\x89PNG")
    for name, way in found["ways"].items():
        assert way["tokens_per_s"] > 0, name
        assert way["tokens"] == found["ways"][PACKED]["tokens"], name
        assert 0 < way["of_product"] < 2, name
        assert way["prepare_s"] > 0, name
    assert found["ways"][PACKED]["packed_over"] == 1.0
    assert found["saves"]["foreground"]["blocked_s"] > 0
    assert found["saves"]["background"]["share"] < 1
    recorded = json.loads((tmp_path / "train_step.jsonl").read_text())
    assert recorded["ways"] == found["ways"]
    assert recorded["machine"]["cores"] >= 1


def test_clips_of_one_length_are_not_padded() -> None:
    assert set(plan_ways(step_settings(durations="3"), rank=0, ranks=1)) == {PACKED, ONE}


def test_a_gpu_gets_what_fits_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    unset = dict.fromkeys(("durations", "packs", "reps", "height", "width", "prompt_tokens", "dtype"))
    given: dict[str, Any] = {"model": "cogvideox-5b", "budget": 2, **unset}
    assert settings(**given).durations_s == (3, 9, 18, 30, 63)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu = settings(**given)
    ways = plan_ways(on_gpu, rank=0, ranks=1)
    longest = max(sum(on_gpu.tokens(width) for _, width in batch) for way in ways.values() for batch in way)
    assert on_gpu.dtype == "bfloat16"
    assert longest == 2 * (7 * 1350 + 226)
    assert sum(len(batch) for batch in ways[PACKED]) == 4


def test_saves_without_room_on_disk_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    chosen = step_settings(durations="1")
    assert train(chosen, nproc=1, json_path=None, plot_path=None, results=tmp_path) == 0
    assert json.loads((tmp_path / "train_step.jsonl").read_text())["saves"] is None
    out = capsys.readouterr().out
    assert "saves are left out" in out
    assert "batch 1: " in out
    assert "saving in the" not in out


def test_waiting_for_data_is_measured_as_training_waits(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set")
    chosen = step_settings(dataset=str(tmp_path / "set"), loader_steps=3, durations="1")
    assert train(chosen, nproc=1, json_path=None, plot_path=None, results=tmp_path) == 0
    loader = json.loads((tmp_path / "train_step.jsonl").read_text())["loader"]
    assert loader["steps"] == 3
    assert 0 <= loader["waiting"] < 1


def test_settings_that_are_none_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--durations three"):
        step_settings(durations="three")
    with pytest.raises(ConfigError, match="height"):
        step_settings(height=20)
    with pytest.raises(ConfigError, match="recompute"):
        step_settings(recompute="all")


def test_the_plan_is_fuller_and_busier_than_what_others_do() -> None:
    seconds = durations("curriculum", 4096, seed=1)
    assert set(seconds) == set(CURRICULUM_S)
    budget = 2 * int(tokens_of(np.array([63.0]))[0])
    rows = {
        way: summarize(loads, "curriculum", 2, way, budget=budget, ranks=8, seconds=seconds)
        for way, loads in contenders(seconds, budget=budget, ranks=8, seed=1).items()
    }
    ours = rows[OURS]
    assert ours.fill > 0.98
    assert ours.busy > 0.92
    for way in ("first come", "pad to longest", "pad in batch", "batch 1", "buckets"):
        assert ours.useful > rows[way].useful + 0.1, way
    assert rows["sort all"].busy >= ours.busy
    assert rows["plan, window 8"].busy < rows["plan, window 64"].busy < ours.busy
    for row in rows.values():
        assert 0 < row.useful <= row.busy <= 1
        assert row.fill <= 1
    assert rows["buckets"].kept == pytest.approx(1, abs=0.01)
    assert all(
        load.cost == load.useful_cost for load in contenders(seconds, budget=budget, ranks=8, seed=1)[OURS]
    )


def test_a_packing_bench_leaves_a_table_and_a_chart(tmp_path: Path) -> None:
    numbers, chart = tmp_path / "numbers.json", tmp_path / "chart.png"
    assert packing(4096, ranks=8, seed=0, json_path=numbers, plot_path=chart, results=tmp_path) == 0
    found = json.loads(numbers.read_text())
    assert {row["lengths"] for row in found["rows"]} == {"curriculum", "lognormal", "uniform"}
    assert found["planning_s_per_million"] > 0
    assert chart.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="no folder"):
        packing(4096, ranks=8, seed=0, json_path=tmp_path / "no" / "a.json", plot_path=None, results=tmp_path)
