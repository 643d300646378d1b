"""Sequence parallel: one pack in, the tokens that this rank computes out; several ranks share a pack.

Every layer but attention works token by token, so each rank has a run of the stream to itself. Around
attention, ranks trade tokens for heads: each attends over the whole stream with its share of the heads, and
trades back (Ulysses, https://arxiv.org/abs/2309.14509). Four times a block's tokens travel in a forward pass;
the heads limit how many ranks can share a pack, and any attention route works as it is.

L tokens of the stream, l of this rank; V video tokens, P elements of a patch; M prompt tokens; N heads, D
width of a head; R ranks that share a pack.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist

from trainer.attention import AttentionFunction, CrossAttentionFunction, host_bounds
from trainer.collate import PackedInputs

TABLES_OF_THE_STREAM = ("modulation_row", "cos", "sin", "clip_cos", "clip_sin")
"""Parts of a pack with a row per token of the stream."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedShare(PackedInputs):
    """One rank's run of a pack's stream. Bounds and lengths are those of the whole pack."""

    video_counts: tuple[int, ...]
    """Video tokens of each rank."""

    def __post_init__(self) -> None:
        """The pack was checked when it was collated, and here only a part of its tokens is left."""


@dataclass(frozen=True)
class SequenceParallel:
    """The ranks that share a pack, and this one's place among them."""

    rank: int
    size: int
    group: dist.ProcessGroup

    def split(self, inputs: PackedInputs) -> PackedShare:
        """This rank's run of a pack that is still on the host."""
        videos = len(inputs.video)
        edges = self._edges(len(inputs.order))
        runs = [inputs.order[start:end] for start, end in itertools.pairwise(edges)]
        start, end = edges[self.rank], edges[self.rank + 1]
        rows, order = torch.unique(runs[self.rank], return_inverse=True)
        video_rows, text_rows = rows[rows < videos], rows[rows >= videos]
        if bool((inputs.order < videos).all()):
            # Text is not in the stream but in attention of its own, to which every rank needs all of it.
            text_rows = torch.arange(videos, videos + len(inputs.text))
        own = (inputs.video_places >= start) & (inputs.video_places < end)
        values: dict[str, Any] = {field.name: getattr(inputs, field.name) for field in fields(PackedInputs)}
        values |= {
            "video": inputs.video[video_rows],
            "text": inputs.text[text_rows - videos],
            "order": order,
            "video_places": inputs.video_places[own] - start,
            "positions": None if inputs.positions is None else inputs.positions[own],
        }
        values |= {
            name: None if values[name] is None else values[name][start:end] for name in TABLES_OF_THE_STREAM
        }
        if inputs.learned_row is not None:
            values["learned_row"] = inputs.learned_row[torch.cat([video_rows, text_rows])]
        return PackedShare(**values, video_counts=tuple(int((run < videos).sum()) for run in runs))

    # The compiler breaks off before an exchange: it may order operations otherwise on each rank, and ranks
    # that do not trade the same things at the same time wait for ever.

    def attention(self, function: AttentionFunction) -> AttentionFunction:
        """`function` on runs: q, k, v [l, N, D] -> [l, N, D]; bounds are those of the whole stream."""

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
        ) -> torch.Tensor:
            lengths = self._lengths(cu_seqlens)
            # One exchange for all three.
            q, k, v = self._heads(torch.cat([q, k, v], dim=-1), lengths).chunk(3, dim=-1)
            return self._tokens(function(q, k, v, cu_seqlens, max_seqlen), lengths)

        return attend

    def cross(self, function: CrossAttentionFunction) -> CrossAttentionFunction:
        """`function` on a run of queries [l, N, D] and all keys [M, N, D] -> [l, N, D]."""

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def attend(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            cu_q: torch.Tensor,
            cu_k: torch.Tensor,
            max_q: int,
            max_k: int,
        ) -> torch.Tensor:
            lengths = self._lengths(cu_q)
            k, v = (x.unflatten(1, (self.size, -1))[:, self.rank] for x in (k, v))
            return self._tokens(function(self._heads(q, lengths), k, v, cu_q, cu_k, max_q, max_k), lengths)

        return attend

    def gather(self, prediction: torch.Tensor, share: PackedShare) -> torch.Tensor:
        """This rank's video tokens -> those of the whole pack, [V, P], on every rank.

        Gradients of all ranks' losses add up in it: with the same loss on each, divide it by `size`.
        """
        sent = [len(prediction)] * self.size
        return _exchange(prediction.repeat(self.size, 1), sent, list(share.video_counts), self.group)

    def _edges(self, num_tokens: int) -> list[int]:
        """Where ranks' runs start and end; they differ by at most one token."""
        return [num_tokens * rank // self.size for rank in range(self.size + 1)]

    def _lengths(self, cu_seqlens: torch.Tensor) -> list[int]:
        return [end - start for start, end in itertools.pairwise(self._edges(host_bounds(cu_seqlens)[-1]))]

    def _heads(self, x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """[l, N, D] -> [L, N / R, D]."""
        rows = x.unflatten(1, (self.size, -1)).transpose(0, 1).flatten(0, 1)
        return _exchange(rows, [len(x)] * self.size, lengths, self.group)

    def _tokens(self, x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """[L, N / R, D] -> [l, N, D]."""
        length = lengths[self.rank]
        rows = _exchange(x, lengths, [length] * self.size, self.group)
        return rows.unflatten(0, (self.size, length)).transpose(0, 1).flatten(1, 2)


def _exchange(
    x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """The first `sent[0]` rows go to rank 0 and so on; `received[0]` rows of rank 0 come first, and so on."""
    exchanged: torch.Tensor = _Exchange.apply(x, sent, received, group)  # type: ignore[no-untyped-call]
    return exchanged


class _Exchange(torch.autograd.Function):
    """An all-to-all, whose gradients travel the same ways back."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = x.new_empty((sum(received), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _exchange(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None
