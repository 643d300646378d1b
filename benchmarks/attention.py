"""Attention routes on packs of the curriculum's clips: TFLOP/s of each that works, beside a matrix product.

`python -m benchmarks.attention` takes clips of 3 to 63 s, 1350 tokens a latent frame and a prompt each, fills
packs as long as the longest with each kind and with a mix, and times every route, forward and forward with
backward, at heads of 64 and 128; and again as `precision.deterministic` has it. All routes are asked for the
same arithmetic: 4 L^2 D per segment and head forward, two and a half times that backward (as FlashAttention
counts, https://arxiv.org/abs/2307.08691). On a CPU clips are 500 times shorter: it shows that it runs.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.record import append_result
from trainer.attention import CrossAttentionFunction
from trainer.probe import try_route
from trainer.routes import ROUTES

LATENT_FRAMES = {"3 s": 13, "9 s": 37, "18 s": 73, "30 s": 121, "63 s": 253}
TOKENS_PER_FRAME = 1350
PROMPT_TOKENS = 226
HEADS = ((16, 64), (8, 128))
"""Heads and their width; both are 1024 wide."""
SECONDS = 1.0
"""Least time that a number is measured for, after one call that compiles and warms up."""


@dataclass(frozen=True)
class Row:
    """One route on one kind of pack."""

    route: str
    deterministic: bool
    head_dim: int
    pack: str
    forward: float
    """TFLOP/s."""
    both: float
    """TFLOP/s of forward and backward."""


def packs(*, shrink: int = 1) -> dict[str, list[int]]:
    """Tokens of the segments of each kind of pack; none is longer than one of the longest clip."""
    lengths = {
        name: (frames * TOKENS_PER_FRAME + PROMPT_TOKENS) // shrink for name, frames in LATENT_FRAMES.items()
    }
    room = max(lengths.values())
    made = {name: [length] * (room // length) for name, length in lengths.items()}
    return made | {"3 to 30 s": [length for length in lengths.values() if length < room]}


def measure(*, device: torch.device, shrink: int, seconds: float) -> dict[str, Any]:
    """All numbers: a row per route and pack, the device's matrix product, and what could not run, and why."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, passed_over = [], {}
    for deterministic, (heads, head_dim), route in itertools.product((False, True), HEADS, ROUTES):
        with deterministic_algorithms(deterministic):
            found = try_route(route, device=device, dtype=dtype, heads=heads, head_dim=head_dim)
            if isinstance(found, str):
                passed_over[route] = found
                continue
            for pack, lengths in packs(shrink=shrink).items():
                run = calls(found[0], lengths, device=device, dtype=dtype, heads=heads, head_dim=head_dim)
                flops = 4 * sum(length**2 for length in lengths) * heads * head_dim
                forward, both = (
                    factor * flops / duration(call, device=device, seconds=seconds) / 1e12
                    for factor, call in zip((1, 3.5), run, strict=True)
                )
                rows.append(Row(route, deterministic, head_dim, pack, forward, both))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "shrink": shrink,
        "matmul_tflops": matmul(
            device=device, dtype=dtype, size=8192 if shrink == 1 else 512, seconds=seconds
        ),
        "rows": [asdict(row) for row in rows],
        "passed_over": passed_over,
    }


def calls(
    cross: CrossAttentionFunction,
    lengths: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A forward pass without gradients, and one with its backward pass."""
    shape = (sum(lengths), heads, head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    weight = torch.randn(shape, device=device, dtype=dtype)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    bounds = (cu, cu, max(lengths), max(lengths))

    def forward() -> object:
        with torch.no_grad():
            return cross(q, k, v, *bounds)

    def both() -> object:
        return torch.autograd.grad(cross(q, k, v, *bounds), (q, k, v), weight)

    return forward, both


def duration(call: Callable[[], object], *, device: torch.device, seconds: float) -> float:
    """Median seconds of a call, the device waited for."""

    def once() -> float:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    first = once()
    return statistics.median([first, *(once() for _ in range(min(50, math.ceil(seconds / first))))])


def matmul(*, device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    """TFLOP/s of one square matrix product: what a kernel can hope for."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / duration(lambda: a @ b, device=device, seconds=seconds) / 1e12


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def table(numbers: dict[str, Any]) -> list[str]:
    """One line per route and head, `forward / forward and backward` for each kind of pack."""
    names = list(packs())
    rows = {(r["route"], r["deterministic"], r["head_dim"], r["pack"]): r for r in numbers["rows"]}
    lines = [f"{'TFLOP/s':<32}" + "".join(f"{name:>19}" for name in names)]
    for route, deterministic, head_dim in dict.fromkeys(key[:3] for key in rows):
        label = f"{route} {head_dim}{', deterministic' if deterministic else ''}"
        cells = (rows[route, deterministic, head_dim, name] for name in names)
        pairs = (f"{cell['forward']:.3g} / {cell['both']:.3g}" for cell in cells)
        lines.append(f"{label:<32}" + "".join(f"{pair:>19}" for pair in pairs))
    lines.append(f"{numbers['device']}, {numbers['dtype']}; a matrix product: {numbers['matmul_tflops']:.3g}")
    return lines + [f"{route} cannot be used: {reason}" for route, reason in numbers["passed_over"].items()]


def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    numbers = measure(device=device, shrink=1 if cuda else 500, seconds=SECONDS if cuda else 0.05)
    print("\n".join(table(numbers)))
    print(json.dumps(numbers))
    append_result("attention", numbers)


if __name__ == "__main__":
    main()
