"""Attention routes on packs of the curriculum's clips: TFLOP/s of each that works, beside a matrix product.

`python -m benchmarks.attention` takes clips of 3 to 63 s, 1350 tokens a latent frame and a prompt each, fills
packs as long as the longest with each kind and with a mix, and times every route, forward and forward with
backward, at heads of 64 and 128; and again as `precision.deterministic` has it. All routes are asked for the
same arithmetic: 4 L^2 D per segment and head forward, two and a half times that backward (as FlashAttention
counts, https://arxiv.org/abs/2307.08691). Every number is printed and recorded as soon as it is known, those
most asked for first, and nothing new is begun after --minutes. On a CPU clips are 500 times shorter: it shows
that it runs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.record import RESULTS, append_result
from trainer.attention import CrossAttentionFunction
from trainer.probe import try_route
from trainer.routes import ROUTES

LATENT_FRAMES = {"3 s": 13, "9 s": 37, "18 s": 73, "30 s": 121, "63 s": 253}
TOKENS_PER_FRAME = 1350
PROMPT_TOKENS = 226
WIDTH = 1024
"""Of all heads together."""
HEAD_DIMS = (64, 128)
MIX = "3 to 30 s"
SECONDS = 0.5
"""Least time that a number is measured for, after one call that compiles and warms up."""


@dataclass(frozen=True)
class Row:
    """One route on one kind of pack."""

    route: str
    deterministic: bool
    head_dim: int
    pack: str
    forward: float | None = None
    """TFLOP/s."""
    both: float | None = None
    """TFLOP/s of forward and backward."""
    failed: str = ""
    """Why there are none."""

    def __str__(self) -> str:
        label = f"{self.route} {self.head_dim}{', deterministic' if self.deterministic else ''}"
        found = self.failed or f"{self.forward:7.3g} forward, {self.both:7.3g} with backward"
        return f"{label:<32}{self.pack:<12}{found}"


def packs(*, shrink: int = 1) -> dict[str, list[int]]:
    """Tokens of the segments of each kind of pack; none is longer than one of the longest clip."""
    lengths = {
        name: (frames * TOKENS_PER_FRAME + PROMPT_TOKENS) // shrink for name, frames in LATENT_FRAMES.items()
    }
    room = max(lengths.values())
    made = {name: [length] * (room // length) for name, length in lengths.items()}
    return {MIX: [length for length in lengths.values() if length < room]} | made


def measure(
    *,
    device: torch.device,
    shrink: int,
    seconds: float,
    minutes: float = math.inf,
    routes: Sequence[str] = tuple(ROUTES),
    head_dims: Sequence[int] = HEAD_DIMS,
    kinds: Sequence[str] = tuple(packs()),
    deterministic: Sequence[bool] = (False, True),
) -> Iterator[Row]:
    """A row per route, head, kind of pack and determinism, as it is found; one without numbers where a route
    fails. None of which the measuring would begin after `minutes`."""
    dtype = compute_dtype(device)
    end = time.monotonic() + 60 * minutes
    for exact, head_dim, route in itertools.product(deterministic, head_dims, routes):
        heads = WIDTH // head_dim
        with deterministic_algorithms(exact):
            found = try_route(route, device=device, dtype=dtype, heads=heads, head_dim=head_dim)
            for kind in kinds:
                if time.monotonic() > end:
                    return
                row = Row(route, exact, head_dim, kind)
                if isinstance(found, str):
                    yield replace(row, failed=found)
                    continue
                lengths = packs(shrink=shrink)[kind]
                flops = 4 * sum(length**2 for length in lengths) * WIDTH
                try:
                    run = calls(found[0], lengths, device=device, dtype=dtype, heads=heads, head_dim=head_dim)
                    forward, both = (
                        factor * flops / duration(call, device=device, seconds=seconds) / 1e12
                        for factor, call in zip((1, 3.5), run, strict=True)
                    )
                # What kernels and compilers say where they cannot: the next cell may be one they can.
                except Exception as error:
                    yield replace(row, failed=textwrap.shorten(f"{type(error).__name__}: {error}", 200))
                    continue
                yield replace(row, forward=forward, both=both)


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


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
    return statistics.median([first, *(once() for _ in range(min(50, int(seconds / first))))])


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


def table(rows: Sequence[Row]) -> list[str]:
    """One line per route, head and determinism, `forward / forward and backward` for each kind of pack."""
    kinds = list(dict.fromkeys(row.pack for row in rows))
    cells = {(row.route, row.deterministic, row.head_dim, row.pack): row for row in rows}
    lines = [f"{'TFLOP/s':<32}" + "".join(f"{kind:>17}" for kind in kinds)]
    for route, exact, head_dim in dict.fromkeys(key[:3] for key in cells):
        label = f"{route} {head_dim}{', deterministic' if exact else ''}"
        found = [cells.get((route, exact, head_dim, kind)) for kind in kinds]
        numbers = [f"{row.forward:.3g} / {row.both:.3g}" if row and row.forward else "-" for row in found]
        lines.append(f"{label:<32}" + "".join(f"{number:>17}" for number in numbers))
    return lines


def main(arguments: Sequence[str] | None = None, *, results: Path = RESULTS) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    given = _options(arguments)
    shrink, seconds = (1, SECONDS) if cuda else (500, 0.05)
    machine = {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "torch": torch.__version__,
        "dtype": str(compute_dtype(device)).removeprefix("torch."),
        "shrink": shrink,
    }
    product = matmul(device=device, dtype=compute_dtype(device), size=8192 if cuda else 512, seconds=seconds)
    print(f"{machine['device']}, {machine['dtype']}; a matrix product: {product:.3g} TFLOP/s", flush=True)
    append_result("attention", {**machine, "matmul_tflops": product}, folder=results)
    rows = []
    for row in measure(
        device=device,
        shrink=shrink,
        seconds=seconds,
        minutes=given.minutes,
        routes=given.route or tuple(ROUTES),
        head_dims=given.head or HEAD_DIMS,
        kinds=given.pack or tuple(packs()),
        deterministic={"no": (False,), "yes": (True,), "both": (False, True)}[given.deterministic],
    ):
        print(row, flush=True)
        append_result("attention", {**machine, **asdict(row)}, folder=results)
        rows.append(row)
    print("\n".join(table(rows)))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention")
    parser.add_argument("--route", action="append", choices=list(ROUTES), help="only this one; repeatable")
    parser.add_argument("--head", action="append", type=int, choices=HEAD_DIMS, help="only this width")
    parser.add_argument("--pack", action="append", choices=list(packs()), help="only this kind of pack")
    parser.add_argument("--deterministic", choices=("no", "yes", "both"), default="both")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing new after these; default 8")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
