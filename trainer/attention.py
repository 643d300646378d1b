"""Packed attention: one token stream of several clips in, the same stream attended within each clip out.

Every route has one signature, `(q, k, v, cu_seqlens, max_seqlen) -> out`. A route is chosen once, at
start, with its reason, and must first agree with a plain float32 reference, forward and backward. An
explicit setting never falls back. Measured on a CPU, `sdpa` is the only route worth having: padding
takes 7 to 8 times as long, a dense mask 5 times, nested tensors 21 to 28 times.

L packed tokens, N heads, D width of a head, B segments (clips).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from schemas.errors import RunError

AttentionFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""q, k, v [L, N, D], cu_seqlens [B + 1] int32, max_seqlen (host int) -> [L, N, D]."""

PROBE_LENGTHS = (5, 1, 17, 9)
"""Segments of the start-up probe: odd, single-token and longer ones."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest error of the probe, relative to the largest value of the reference."""


@dataclass(frozen=True)
class Attention:
    """The chosen route and why it was chosen."""

    name: str
    reason: str
    function: AttentionFunction


def segment_lengths(bounds: Sequence[int], *, num_tokens: int) -> list[int]:
    """Tokens of each segment; ValueError unless `bounds` run from 0 to `num_tokens`, strictly upwards."""
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if not lengths or bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths) < 1:
        raise ValueError(
            f"cu_seqlens must rise strictly from 0 to the number of tokens, {num_tokens}; these "
            f"{len(bounds)} bounds do not"
        )
    return lengths


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """One scaled-dot-product call per segment; on a GPU reading the bounds waits for the device."""
    lengths = segment_lengths(cu_seqlens.tolist(), num_tokens=q.shape[0])
    # [1, N, L, D]: only four dimensions reach the fused kernels.
    parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2)[0].transpose(0, 1)


ROUTES: dict[str, AttentionFunction] = {"sdpa": sdpa}


def choose_attention(
    setting: str, *, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int
) -> Attention:
    """The route of `setting`, probed with the run's device, type and heads; RunError where it is wrong."""
    if setting == "auto":
        name, reason = "sdpa", f"auto on {device.type}: one call per segment needs no mask and no padding"
    else:
        name, reason = setting, "set by model.attention"
    error = probe(ROUTES[name], device=device, dtype=dtype, heads=heads, head_dim=head_dim)
    if not error <= TOLERANCE[dtype]:
        raise RunError(
            f"attention route {name!r} disagrees with the float32 reference on this machine: relative "
            f"error {error:.1e}, expected at most {TOLERANCE[dtype]:.0e} in {dtype}; set model.attention to "
            "another route"
        )
    return Attention(name, f"{reason}; probe error {error:.0e}", ROUTES[name])


def probe(
    function: AttentionFunction, *, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int
) -> float:
    """Largest relative error of output and gradients on four segments against the float32 reference."""
    bounds = [0, *itertools.accumulate(PROBE_LENGTHS)]
    generator = torch.Generator().manual_seed(0)
    shape = (4, bounds[-1], heads, head_dim)
    q, k, v, weight = torch.randn(shape, generator=generator).to(device, dtype).unbind()
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)

    def run(function: AttentionFunction, dtype: torch.dtype) -> list[torch.Tensor]:
        a, b, c = (tensor.to(dtype).detach().requires_grad_() for tensor in (q, k, v))
        out = function(a, b, c, cu_seqlens, max(PROBE_LENGTHS))
        return [out, *torch.autograd.grad((out * weight.to(dtype)).sum(), (a, b, c))]

    found, expected = run(function, dtype), run(_reference, torch.float32)
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)]
    return float(torch.tensor(errors).max())  # unlike max(), keeps a NaN


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """Softmax attention written out, segment by segment; shares nothing with the routes."""
    out = torch.empty_like(q)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        scores = torch.einsum("qnd,knd->nqk", q[start:end], k[start:end]) / q.shape[-1] ** 0.5
        out[start:end] = torch.einsum("nqk,knd->qnd", scores.softmax(-1), v[start:end])
    return out
