"""Where the time of a run went: the share of each stage in what it could have used, and what to do about it.

In: seconds by stage, summed over the units of a pass. Out: plain numbers for `summary.json`, and one sentence
for a person. Starting workers and loading weights are counted apart: a long run has them once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAGES = ("load", "decode", "encode", "write", "decode_wait")
"""What a worker's wall clock goes to. Decoding and writing run beside the others, decoding in as many
decoders as there are; `decode_wait` is when the encoder stood idle for want of clips."""
_OVER = {"decode": "clips", "write": "writing and committing", "units": "the lack of a unit"}
"""What the encoder is idle over."""
OWN_PACE = 0.95
"""Busy share of the encoder above which only a faster or another one helps."""


def where_time_went(
    seconds: Mapping[str, float], *, wall_s: float, start_s: float, workers: int, gpu_names: list[str]
) -> dict[str, Any]:
    """Seconds and busy shares by stage, decoders a worker, the bottleneck and what helps against it.

    Of what each is a share: `load`, of the workers' time since the first of them began (`start_s`); `decode`,
    of the decoders' time; `encode`, `write` and `decode_wait`, of the workers' time without loading.
    """
    spent = {stage: seconds.get(stage, 0.0) for stage in STAGES}
    have = max(1e-9, workers * (wall_s - start_s))
    decoders_s = seconds.get("decoders", 0.0)
    working = max(1e-9, have - spent["load"])
    of = {"load": have, "decode": decoders_s}
    # Clips that are decoded while weights are loaded can make decoders look busier than they can be.
    shares = {stage: min(1.0, value / max(1e-9, of.get(stage, working))) for stage, value in spent.items()}
    total = max(seconds.get("total", 0.0), spent["load"])
    decoders = decoders_s / max(1e-9, total - spent["load"])
    idle = {
        "decode": shares["decode_wait"],
        "write": max(0.0, min(spent["write"], total - spent["load"] - spent["encode"] - spent["decode_wait"]))
        / working,
        "units": max(0.0, have - total) / working,
    }
    pressure = {"load": shares["load"]} | (
        {"encode": shares["encode"]} if shares["encode"] >= OWN_PACE else idle
    )
    worst = max(pressure, key=lambda stage: pressure[stage])
    return {
        "start_s": round(start_s, 3),
        "stage_seconds": {stage: round(value, 3) for stage, value in spent.items()},
        "stage_busy": {stage: round(share, 3) for stage, share in shares.items()},
        "decoders_per_worker": round(decoders, 1),
        "gpus": gpu_names,
        "bottleneck": worst if any(spent.values()) else None,
        "advice": _advice(worst, shares, idle, decoders, gpu_names) if any(spent.values()) else None,
    }


def _advice(
    worst: str, shares: Mapping[str, float], idle: Mapping[str, float], decoders: float, gpu_names: list[str]
) -> str:
    where = f" on {', '.join(gpu_names)}" if gpu_names else ""
    busy = f"the encoder{where} was busy {shares['encode']:.0%} of the time"
    if worst == "load":
        return (
            f"loading the encoders took {shares['load']:.0%} of the time: the run was too short to say more"
        )
    if worst == "encode":
        return (
            f"encoding: {busy}, so this is its own pace; more GPUs, or more executor.workers where there are "
            "free cores, make the run faster"
        )
    over = ", ".join(f"{_OVER[stage]} {share:.0%}" for stage, share in idle.items() if share >= 0.005)
    remedy = {
        "decode": f"decoding: {decoders:.1f} decoders a worker were busy {shares['decode']:.0%} of the time; "
        "with free cores here raise executor.decoders_per_worker, with some on other nodes set or raise "
        "executor.decode_actors",
        "write": f"writing: its thread was busy {shares['write']:.0%} of the time; put output on a faster "
        "disk, or in a new dataset more clips into a shard (units.rows)",
        "units": "units: workers had none to make; fewer executor.workers, or fewer clips in "
        "a shard of a new dataset (units.rows), leave less of that at the end of a run",
    }
    return f"{remedy[worst]}; {busy}, and idle over {over}"
