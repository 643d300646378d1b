"""Packed attention: one token stream of several clips in, the same stream attended within each clip out.

Every route (`trainer.routes`) has one signature, and another for cross attention with bounds of its own for
the keys. Here are both, what they know of bounds, and `sdpa`, which works everywhere. Measured on a CPU it is
the only one worth having: padding takes 7 to 8 times as long, a dense mask 5 times, nested tensors 21 to 28.

L packed tokens, M packed keys, N heads, D width of a head, B segments (clips, or spans of clips).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

AttentionFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""q, k, v [L, N, D], cu_seqlens [B + 1] int32, max_seqlen (host int) -> [L, N, D]."""

CrossAttentionFunction = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int], torch.Tensor
]
"""q [L, N, D], k, v [M, N, D], cu_q, cu_k [B + 1] int32, max_q, max_k (host ints) -> [L, N, D]."""

_host_bounds: Any = WeakTensorKeyDictionary()
"""Bounds on a device -> the same on the host, as long as the tensor lives."""


@dataclass(frozen=True)
class Attention:
    """The chosen route and why it was chosen."""

    name: str
    reason: str
    function: AttentionFunction
    cross: CrossAttentionFunction


def within(cross: CrossAttentionFunction) -> AttentionFunction:
    """Self attention by a route: keys have the bounds of the queries."""

    def function(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> torch.Tensor:
        return cross(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)

    return function


def segment_lengths(bounds: Sequence[int], *, num_tokens: int) -> list[int]:
    """Tokens of each segment; ValueError unless `bounds` run from 0 to `num_tokens`, strictly upwards."""
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if not lengths or bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths) < 1:
        raise ValueError(
            f"cu_seqlens must rise strictly from 0 to the number of tokens, {num_tokens}; these "
            f"{len(bounds)} bounds do not"
        )
    return lengths


def host_bounds(cu_seqlens: torch.Tensor) -> list[int]:
    """The bounds as numbers. On a GPU the first call waits for the device, later ones do not."""
    if cu_seqlens.device.type == "cpu":
        return cu_seqlens.tolist()
    if cu_seqlens not in _host_bounds:
        _host_bounds[cu_seqlens] = cu_seqlens.tolist()
    bounds: list[int] = _host_bounds[cu_seqlens]
    return bounds


def remember_bounds(cu_seqlens: torch.Tensor, bounds: list[int]) -> None:
    """Spare `host_bounds` the wait: `bounds` are what `cu_seqlens` will hold on its device."""
    if cu_seqlens.device.type != "cpu":
        _host_bounds[cu_seqlens] = bounds


@torch.compiler.disable  # type: ignore[untyped-decorator]
def sdpa_cross(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
) -> torch.Tensor:
    """One scaled-dot-product call per segment."""
    queries = segment_lengths(host_bounds(cu_q), num_tokens=q.shape[0])
    keys = segment_lengths(host_bounds(cu_k), num_tokens=k.shape[0])
    # [1, N, L, D]: only four dimensions reach the fused kernels.
    parts = zip(
        *(
            x.transpose(0, 1)[None].split(lengths, dim=2)
            for x, lengths in ((q, queries), (k, keys), (v, keys))
        ),
        strict=True,
    )
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2)[0].transpose(0, 1)


sdpa = within(sdpa_cross)

UNCALLED = Attention("sdpa", "never called", sdpa, sdpa_cross)
"""For models that are built to be looked at, not to run."""
