"""Where the time of a run went: the share of each stage in what it could have used, and what to do about it.

In: seconds by stage, summed over the units of a pass. Out: plain numbers for `summary.json`, and one sentence
for a person. Starting workers and loading weights are counted apart: a long run has them once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAGES = ("load", "decode", "encode", "write", "decode_wait")
"""What a worker's wall clock goes to. Decoding runs beside the others, in as many decoders as there are;
`decode_wait` is when the encoder had to wait for it."""


def where_time_went(
    seconds: Mapping[str, float], *, wall_s: float, start_s: float, workers: int, gpu_names: list[str]
) -> dict[str, Any]:
    """Seconds and busy shares by stage, decoders a worker, the bottleneck and what helps against it.

    Of what each is a share: `load`, of the workers' time since the first of them began (`start_s`); `decode`,
    of the decoders' time; `encode`, `write` and `decode_wait`, of the workers' time without loading.
    """
    spent = {stage: seconds.get(stage, 0.0) for stage in STAGES}
    have = max(1e-9, workers * (wall_s - start_s))
    working = max(1e-9, have - spent["load"])
    of = {"load": have, "decode": seconds.get("decoders", 0.0)}
    shares = {stage: value / max(1e-9, of.get(stage, working)) for stage, value in spent.items()}
    decoders = seconds.get("decoders", 0.0) / max(1e-9, seconds.get("total", 0.0) - spent["load"])
    # Waiting for clips is decoding's fault also where its children idle: files may come slowly.
    pressure = {stage: shares[stage] for stage in ("load", "encode", "write")}
    pressure["decode"] = max(shares["decode"], shares["decode_wait"])
    worst = max(pressure, key=lambda stage: pressure[stage])
    return {
        "start_s": round(start_s, 3),
        "stage_seconds": {stage: round(value, 3) for stage, value in spent.items()},
        "stage_busy": {stage: round(share, 3) for stage, share in shares.items()},
        "decoders_per_worker": round(decoders, 1),
        "gpus": gpu_names,
        "bottleneck": worst if any(spent.values()) else None,
        "advice": _advice(worst, shares, decoders, gpu_names) if any(spent.values()) else None,
    }


def _advice(worst: str, shares: Mapping[str, float], decoders: float, gpu_names: list[str]) -> str:
    if worst == "decode":
        return (
            f"decoding: {decoders:.1f} decoders a worker were busy {shares['decode']:.0%} of the time, and "
            f"the encoder waited for clips {shares['decode_wait']:.0%} of it; raise "
            "executor.decoders_per_worker where there are free cores, or executor.decode_actors where other "
            "nodes have them"
        )
    if worst == "encode":
        where = f" on {', '.join(gpu_names)}" if gpu_names else ""
        return (
            f"encoding: the encoder{where} was busy {shares['encode']:.0%} of the time, so this is its own "
            "pace; more GPUs, or more executor.workers where there are free cores, make the run faster"
        )
    if worst == "write":
        return (
            f"writing: it took {shares['write']:.0%} of the time; put output on a faster disk, or in a new "
            "dataset more clips into a shard (units.rows)"
        )
    return f"loading the encoders took {shares['load']:.0%} of the time: the run was too short to say more"
