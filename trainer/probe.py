"""Choosing how attention is computed: a setting and a machine in, a route that was seen to be right out.

A route is chosen once, at start, with its reason, and must first agree with a plain float32 reference,
forward and backward. `auto` names every better route that it passed over, and why; an explicit setting never
falls back.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Sequence

import torch

from schemas.errors import RunError
from trainer.attention import Attention, CrossAttentionFunction, within
from trainer.routes import ROUTES

PROBE_LENGTHS = (5, 1, 131, 17)
"""Segments of the start-up probe: odd, single-token, and longer than a kernel's tile."""

PROBE_KEYS = (3, 70, 9, 1)
"""Keys of the same segments, for cross attention."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest error of the probe, relative to the largest value of the reference."""


def candidates(device: torch.device) -> tuple[str, ...]:
    """The routes that `auto` tries, best first; `flash_attn_2` is an extra that must be asked for."""
    if device.type != "cuda":
        return ("sdpa",)
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    return ("flash_attn_3", "varlen", "flex", "sdpa") if hopper else ("varlen", "flex", "sdpa")


def choose_attention(
    setting: str, *, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int
) -> Attention:
    """The route of `setting`, probed with the run's device, type and heads; RunError where none is right.

    `heads` are those that one rank computes. Backward passes repeat bit for bit where torch is asked for
    deterministic algorithms (`precision.deterministic`).
    """
    names = candidates(device) if setting == "auto" else (setting,)
    passed_over: list[str] = []
    for name in names:
        found = try_route(name, device=device, dtype=dtype, heads=heads, head_dim=head_dim)
        if isinstance(found, str):
            passed_over.append(f"{name}: {found}")
            continue
        cross, error = found
        asked = f"auto on {_describe(device)}" if setting == "auto" else "set by model.attention"
        reason = "; ".join([f"{asked}; probe error {error:.0e}", *passed_over])
        return Attention(name, reason, within(cross), cross)
    raise RunError(
        f"model.attention = {setting!r}: no attention route works with {dtype} on {_describe(device)} ("
        + "; ".join(passed_over)
        + "); set model.attention to another route"
    )


def try_route(
    name: str, *, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int
) -> tuple[CrossAttentionFunction, float] | str:
    """(route, error of its probe), or the reason why it cannot be used here."""
    try:
        cross = ROUTES[name]()
        error = probe(cross, device=device, dtype=dtype, heads=heads, head_dim=head_dim)
    # What a kernel says where it does not fit: no package, another interface, a wrong type, size or device.
    except Exception as refusal:
        return textwrap.shorten(str(refusal), 200) or type(refusal).__name__
    if not error <= TOLERANCE[dtype]:
        return (
            f"disagrees with the float32 reference: relative error {error:.1e}, expected at most "
            f"{TOLERANCE[dtype]:.0e}"
        )
    return cross, error


def probe(
    cross: CrossAttentionFunction, *, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int
) -> float:
    """Largest relative error of output and gradients, self and cross, against the float32 reference."""
    errors = []
    for keys in (PROBE_LENGTHS, PROBE_KEYS):
        found, expected = (
            _outputs(function, keys, device=device, dtype=dtype, cast=cast, heads=heads, head_dim=head_dim)
            for function, cast in ((cross, dtype), (reference, torch.float32))
        )
        errors += [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)]
    return float(torch.tensor(errors).max())  # unlike max(), keeps a NaN


def _outputs(
    function: CrossAttentionFunction,
    keys: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    cast: torch.dtype,
    heads: int,
    head_dim: int,
) -> list[torch.Tensor]:
    """Output and gradients of `function` in type `cast`, on numbers that type `dtype` has exactly."""
    generator = torch.Generator().manual_seed(0)
    lengths = PROBE_LENGTHS, keys, keys, PROBE_LENGTHS
    q, k, v, weight = (
        torch.randn(sum(length), heads, head_dim, generator=generator).to(device, dtype).to(cast)
        for length in lengths
    )
    cu_q = _bounds(PROBE_LENGTHS, device)
    # Self attention is asked for as the model does: with one tensor of bounds.
    cu_k = cu_q if keys is PROBE_LENGTHS else _bounds(keys, device)
    for leaf in (q, k, v):
        leaf.requires_grad_()
    out = function(q, k, v, cu_q, cu_k, max(PROBE_LENGTHS), max(keys))
    return [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
) -> torch.Tensor:
    """Softmax attention written out, segment by segment; shares nothing with the routes."""
    out = torch.empty_like(q)
    for (start, end), (first, last) in zip(_spans(cu_q), _spans(cu_k), strict=True):
        scores = torch.einsum("qnd,knd->nqk", q[start:end], k[first:last]) / q.shape[-1] ** 0.5
        out[start:end] = torch.einsum("nqk,knd->qnd", scores.softmax(-1), v[first:last])
    return out


def _spans(cu_seqlens: torch.Tensor) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(cu_seqlens.tolist())


def _bounds(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
