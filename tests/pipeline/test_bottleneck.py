"""Where the time of a run went, and the sentence about it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipeline.bottleneck import where_time_went
from pipeline.progress import Tally
from pipeline.unit import UnitResult


def went(workers: int, **seconds: float) -> dict[str, Any]:
    spent = {"total": 110.0, "load": 10.0, **seconds}
    return where_time_went(spent, wall_s=112.0, start_s=2.0, workers=workers, gpu_names=["H200"])


def test_shares_are_of_what_a_stage_could_have_used() -> None:
    found = went(1, decode=90.0, decoders=300.0, encode=97.0, write=5.0, decode_wait=2.0)
    assert found["stage_busy"] == {
        "load": 0.091,
        "decode": 0.3,
        "encode": 0.97,
        "write": 0.05,
        "decode_wait": 0.02,
    }
    assert found["stage_seconds"]["decode"] == 90.0
    assert (found["decoders_per_worker"], found["start_s"], found["gpus"]) == (3.0, 2.0, ["H200"])
    assert went(2, encode=97.0)["stage_busy"]["encode"] == round(97 / 210, 3)


@pytest.mark.parametrize(
    ("seconds", "stage", "said"),
    [
        ({"encode": 97.0, "decode": 95.0, "decoders": 100.0}, "encode", "on H200 was busy 97%.*more GPUs"),
        (
            {"encode": 60.0, "decode": 97.0, "decoders": 100.0, "decode_wait": 39.0},
            "decode",
            r"1\.0 decoders a worker were busy 97%.*H200 was busy 60% .* idle over clips 39%$",
        ),
        ({"encode": 85.0, "decode_wait": 13.0, "decode": 9.0, "decoders": 100.0}, "decode", "busy 85%.*13%"),
        ({"encode": 70.0, "write": 20.0, "total": 85.0}, "units", "fewer executor.workers.*a unit 25%"),
        ({"encode": 20.0, "decode": 10.0, "decoders": 100.0, "decode_wait": 78.0}, "decode", "decode_actors"),
        ({"encode": 20.0, "write": 70.0}, "write", "faster disk"),
        ({"encode": 20.0, "load": 80.0}, "load", "too short"),
        # What no stage owns to, as starting threads, is not called writing.
        ({"encode": 3.0, "write": 0.1, "load": 45.0, "total": 100.0}, "load", "too short"),
    ],
)
def test_the_bottleneck_is_named_with_what_to_do(seconds: dict[str, float], stage: str, said: str) -> None:
    found = went(1, **seconds)
    assert found["bottleneck"] == stage
    assert re.search(said, found["advice"])


def test_a_pass_without_work_has_no_bottleneck() -> None:
    found = where_time_went({}, wall_s=0.0, start_s=0.0, workers=1, gpu_names=[])
    assert (found["bottleneck"], found["advice"]) == (None, None)


def test_no_share_is_more_than_all_whichever_unit_ends_first() -> None:
    tally = Tally("latents", total=10)
    tally.started -= 60.0
    tally.add(UnitResult("latents", 1, 2, (), 1.0, 1, {"total": 20.0, "encode": 20.0}))
    tally.started -= 10.0
    tally.add(UnitResult("latents", 0, 8, (), 1.0, 1, {"total": 65.0, "encode": 60.0}))
    summary = tally.summary(workers=2, gpu_names=[])
    assert summary["start_s"] == pytest.approx(5.0, abs=1.0)
    assert summary["stage_busy"]["encode"] == pytest.approx(80 / 130, abs=0.02)
    assert went(1, decode=9.0, decoders=8.0)["stage_busy"]["decode"] == 1.0


def test_rates_are_over_a_familys_own_time_and_incidents_its_own() -> None:
    prompts, latents = Tally("prompts", total=2), Tally("latents", total=40)
    for tally in (prompts, latents):
        tally.started -= 100.0
    latents.add(UnitResult("latents", 0, 20, (), 60.0, 10, {"total": 20.0}))
    latents.incidents["batch_halved"] += 1
    summary = latents.summary(workers=1, gpu_names=[])
    assert (summary["clips_per_s"], summary["video_s_per_s"]) == pytest.approx((1.0, 3.0), rel=0.1)
    assert "1.0" in latents.line()
    assert "0:20 left" in latents.line() or "0:19 left" in latents.line()
    assert prompts.incidents == {}


def test_start_up_ends_where_the_first_unit_begins() -> None:
    tally = Tally("latents", total=4)
    tally.started -= 30.0  # that long ago
    tally.add(UnitResult("latents", 0, 2, (), 1.0, 10, {"total": 20.0, "encode": 19.0}))
    tally.add(UnitResult("latents", 1, 2, (), 1.0, 10, {"total": 5.0, "encode": 4.0}))
    summary = tally.summary(workers=1, gpu_names=[])
    assert summary["start_s"] == pytest.approx(10.0, abs=1.0)
    assert summary["bottleneck"] == "encode"
    assert summary["clips"] == 4
