"""What a training step costs: packed, padded or a clip at a time; determinism, saves and waiting for data.

Whole steps (`benchmarks.step_model`) on the same made-up clips for every way (`benchmarks.step_ways`); what
making the batches takes is a number of its own. Tokens count once and without padding; ways that pad compute
the padding, as attention with a mask does. On CPUs ways are timed in CPU seconds, which other work on the
machine leaves as they are. Beside the tokens/s stands their share of a ceiling: of the FLOPs the device has
by its data sheet, and of those it reaches in one large matrix product.

Every rank calls `measure`, alone, under --nproc or under torchrun.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import clip_flops
from benchmarks.step_model import Bench
from benchmarks.step_stalls import saves, waiting
from benchmarks.step_ways import ONE, PACKED, PADDED, StepSettings, plan_ways
from schemas.train_config import MeshConfig
from trainer.batch import Batch
from trainer.flops import device_peak
from trainer.metrics import memory_gb
from trainer.parallel import Member, join

EXACT = "packed, deterministic"
GOALS = {PADDED: 2.5, ONE: 1.2}
"""Tokens/s of `packed` over these; the second is for short clips on a GPU."""
GOAL_MFU = {"dit": 0.40, "cogvideox-5b": 0.35}
"""One H200, bfloat16, compiled."""


def measure(settings: StepSettings, *, member: Member, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """All numbers of one model; None but on the first of the ranks, which all call it."""
    with join(member, MeshConfig(), deterministic=True) as world:
        torch.use_deterministic_algorithms(False)
        bench = Bench(settings, world)
        say = tell if world.is_main else lambda _: None
        parameters = sum(parameter.numel() for parameter in bench.model.parameters())
        say(f"{settings.model}: {parameters:,} parameters; attention {bench.attention.reason}")
        numbers = {
            "settings": settings.model_dump() | {"dataset": Path(settings.dataset).name},
            "ranks": world.size,
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "parameters": parameters,
            "attention": bench.attention.name,
            "ways": _ways(bench, say),
            "saves": saves(bench, say),
            "loader": waiting(bench) if settings.dataset else None,
        }
        return numbers if world.is_main else None


def _ways(bench: Bench, say: Callable[[str], None]) -> dict[str, Any]:
    """The numbers of every way."""
    settings, world = bench.settings, bench.world
    ways = plan_ways(settings, rank=world.dp_rank, ranks=world.dp_size)
    ways[EXACT] = ways[PACKED]
    batches: dict[str, list[Batch]] = {}
    prepare_s: dict[str, float] = {}
    for name, way in ways.items():
        packs = [bench.pack(clips) for clips in way]
        began = time.perf_counter()
        batches[name] = bench.batches(packs)
        prepare_s[name] = time.perf_counter() - began
    dtype = getattr(torch, settings.dtype)
    clock = time.perf_counter if world.device.type == "cuda" else time.process_time
    peak, product = device_peak(world.device, dtype), product_flops(world.device, dtype, clock=clock)
    seconds, memory = _timed(bench, batches, clock=clock, say=say)
    found: dict[str, Any] = {}
    for name, way in ways.items():
        clips = [settings.tokens(s) for batch in way for s, _ in batch]
        own = (
            clip_flops(bench.architecture, tokens=tokens, prompt=settings.prompt_tokens) for tokens in clips
        )
        tokens, flops = world.sum([sum(clips), sum(each.training() for each in own)])
        median = statistics.median(seconds[name])
        rate = flops / median / world.size
        found[name] = {
            "passes": len(way),
            "clips": len(clips),
            "step_s": round(median, 4),
            "spread_s": [round(min(seconds[name]), 4), round(max(seconds[name]), 4)],
            "prepare_s": round(prepare_s[name], 4),
            "tokens": int(tokens),
            "tokens_per_s": round(tokens / median, 1),
            "mfu": round(rate / peak, 4) if peak else None,
            "of_product": round(rate / product, 4),
            "memory_gb": round(memory[name], 2),
        }
        say(f"  {name}: {median:.2f} s a step, {tokens / median:,.0f} tokens/s, MFU {found[name]['mfu']}")
    for numbers in found.values():
        numbers["packed_over"] = round(found[PACKED]["tokens_per_s"] / numbers["tokens_per_s"], 3)
    return found


def _timed(
    bench: Bench,
    batches: Mapping[str, Sequence[Batch]],
    *,
    clock: Callable[[], float],
    say: Callable[[str], None],
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(Seconds of each step of every way, most memory of its last one in 1e9 bytes); ways take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    memory: dict[str, float] = {}
    for rep in range(-1, bench.settings.reps):  # the first one compiles and warms up
        for name, made in batches.items():
            if bench.world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = clock()
            bench.step(made, exact=name == EXACT)
            taken = clock() - began
            memory[name] = memory_gb(bench.world.device)
            if rep < 0:
                say(f"  {name}: {len(made)} passes, warm-up {taken:.2f} s")
            else:
                seconds[name].append(taken)
    return seconds, memory


def product_flops(device: torch.device, dtype: torch.dtype, *, clock: Callable[[], float]) -> float:
    """Operations a second of one large matrix product: what there is to be had on this machine."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        began = clock()
        _ = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - began)
    return 2 * size**3 / min(seconds)
