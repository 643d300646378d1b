"""What every block does to its stream: tokens modulated by their clip's timestep, turned by their position.

diffusers does both per batch row; on a flat stream each is a gather by clip.

L tokens of the stream, B clips, K kinds of tokens (video, text), N heads, D width of a head, E width of the
model.
"""

from __future__ import annotations

from typing import Any

import torch


def modulate(
    norm: Any, x: torch.Tensor, temb: torch.Tensor, row: torch.Tensor, *, kinds: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' CogVideoXLayerNormZero on a stream: normalised and modulated x, and the gate, both [L, E].

    `norm` has `silu`, `linear` and `norm`; `row` [L] is the token's clip, plus B times its kind.
    """
    # [B, K, (shift, scale, gate) * E] -> one row per (kind, clip), gathered once.
    table = norm.linear(norm.silu(temb)).unflatten(1, (kinds, -1)).transpose(0, 1).flatten(0, 1)
    shift, scale, gate = rows_of(table, row).chunk(3, dim=1)
    return norm.norm(x) * (1 + scale) + shift, gate


def rows_of(table: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """`table` [K B, E] at `row` [L] -> [L, E].

    Indexing would add up gradients one by one, in the type of the table: on a GPU tens of thousands of
    bfloat16 numbers on one address, slowly, and lost once the sum is 256 times as large as they are. Here a
    matrix product adds them up, which does so in float32.
    """
    rows: torch.Tensor = _Rows.apply(table, row)  # type: ignore[no-untyped-call]
    return rows


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row)
        ctx.num_rows = len(table)
        return table.index_select(0, row)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (row,) = ctx.saved_tensors
        at = torch.arange(ctx.num_rows, device=row.device)[:, None] == row
        return at.to(grads[0].dtype) @ grads[0], None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of interleaved pairs [L, N, D], in float32 as diffusers does it."""
    real, imag = torch.unflatten(x.float(), -1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imag, real], dim=-1).flatten(-2)
    return (x.float() * cos[:, None] + turned * sin[:, None]).to(x.dtype)
