"""The ways to compute packed attention: queries, keys and where their segments lie in, attended values out.

Each entry of `ROUTES` loads one route, and raises where its package is not there; whether it is right on
this machine, and quick, is for `trainer.probe` and `python -m benchmarks.attention` to say. None asks the
device for a number while a model runs.

L packed tokens, M packed keys, N heads, D width of a head, B segments.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from trainer.attention import CrossAttentionFunction, sdpa_cross

MASK_BLOCK = 128
"""Tokens per side of a block of flex attention's mask."""


def _load_sdpa() -> CrossAttentionFunction:
    return sdpa_cross


def _load_varlen() -> CrossAttentionFunction:
    """FlashAttention inside torch; its backward honours torch's deterministic setting by itself."""
    from torch.nn.attention.varlen import varlen_attn

    def varlen(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
    ) -> torch.Tensor:
        out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k)
        assert isinstance(out, torch.Tensor)  # it also returns pairs, when asked to
        return out

    return varlen


def _load_flash_attn_3() -> CrossAttentionFunction:
    return _flash(importlib.import_module("flash_attn_interface").flash_attn_varlen_func)


def _load_flash_attn_2() -> CrossAttentionFunction:
    return _flash(importlib.import_module("flash_attn").flash_attn_varlen_func)


def _flash(function: Callable[..., Any]) -> CrossAttentionFunction:
    """A function of the flash-attn packages, which have a deterministic switch of their own."""
    deterministic = torch.are_deterministic_algorithms_enabled()

    def flash(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
    ) -> torch.Tensor:
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            deterministic=deterministic,
        )
        attended: torch.Tensor = out[0] if isinstance(out, tuple) else out  # FlashAttention 3 until 2025
        return attended

    return flash


def _load_flex() -> CrossAttentionFunction:
    """Compiled flex attention; its kernels add in a fixed order, so they repeat bit for bit as they are."""
    from torch.nn.attention.flex_attention import flex_attention

    compile_strictly()
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    masks: Any = WeakTensorKeyDictionary()

    # Found by tensor, so that the blocks of a model share one mask per pack.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def mask_of(cu_q: torch.Tensor, cu_k: torch.Tensor, num_q: int, num_k: int) -> Any:
        if cu_q not in masks:
            masks[cu_q] = WeakTensorKeyDictionary()
        if cu_k not in masks[cu_q]:
            masks[cu_q][cu_k] = segment_mask(cu_q, cu_k, num_q=num_q, num_k=num_k)
        return masks[cu_q][cu_k]

    def flex(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
    ) -> torch.Tensor:
        mask = mask_of(cu_q, cu_k, q.shape[0], k.shape[0])
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out: torch.Tensor = compiled(q, k, v, block_mask=mask)
        return out[0].transpose(0, 1)

    return flex


def segment_mask(cu_q: torch.Tensor, cu_k: torch.Tensor, *, num_q: int, num_k: int) -> Any:
    """Flex attention's mask that keeps each segment to itself, made on the device and from the bounds alone.

    `create_block_mask` asks the rule of every pair of tokens, 29 GB at 172 k tokens. Here a row of blocks
    touches one run of blocks: from the first key of its first segment to the last of its last.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device = cu_q.device
    cu_q, cu_k = cu_q.long(), cu_k.long()
    segment_q = torch.searchsorted(cu_q[1:], torch.arange(num_q, device=device), right=True)
    segment_k = torch.searchsorted(cu_k[1:], torch.arange(num_k, device=device), right=True)

    def same_segment(
        batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor
    ) -> torch.Tensor:
        return segment_q[row] == segment_k[column]

    rows = torch.arange(0, num_q, MASK_BLOCK, device=device)
    columns = torch.arange(0, num_k, MASK_BLOCK, device=device)
    first, last = segment_q[rows], segment_q[(rows + MASK_BLOCK - 1).clamp(max=num_q - 1)]
    start, end = cu_k[first][:, None], cu_k[last + 1][:, None]  # of the keys that a row of blocks may see
    touched = (columns < end) & (columns + MASK_BLOCK > start)
    full = (columns >= start) & (columns + MASK_BLOCK <= end)
    full &= ((first == last) & (rows + MASK_BLOCK <= num_q))[:, None]

    def listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, 1, rows] how many blocks of each row, and [1, 1, rows, columns] which, those first."""
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(touched & ~full),
        *listed(full),
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=same_segment,
        seq_lengths=(num_q, num_k),
    )


def compile_strictly() -> None:
    """Make torch.compile raise where it would go on uncompiled, without a word, after 8 recompilations."""
    config: Any = torch._dynamo.config
    config.fail_on_recompile_limit_hit = True
    config.recompile_limit = max(config.recompile_limit, 32)  # packs differ in sizes; training and validation


BREAKING = ("flex", "sdpa")
"""Routes with parts that torch.compile leaves as they are."""

ROUTES: dict[str, Callable[[], CrossAttentionFunction]] = {
    "flash_attn_3": _load_flash_attn_3,
    "varlen": _load_varlen,
    "flash_attn_2": _load_flash_attn_2,
    "flex": _load_flex,
    "sdpa": _load_sdpa,
}
