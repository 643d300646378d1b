"""Long context: a linear attention over the whole clip in every block, beside attention within its spans.

Attention over a minute of video costs with the square of its length; here a clip is summed up into one
matrix per head, whatever its length. Every token sees the whole clip, earlier and later, through it; what it
gains in reach it loses in sharpness, so it stands beside local attention and not in its place. Its output
passes a gate that starts at 0: published weights keep their output until training opens it (TTT-Video,
https://arxiv.org/abs/2504.05298, gates its layers in the same way). Heads never meet before `out`, so ranks
share them as they share those of attention; norms and gate are whole on every rank.

L tokens of the stream, N heads, D width of a head, E width of the model.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from trainer.attention import AttentionFunction, host_bounds
from trainer.collate import PackedInputs
from trainer.modulation import rotate


class LongContext(nn.Module):
    """The layer of one block; its parameters are `...long_context...`."""

    def __init__(self, width: int, *, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_out = nn.RMSNorm(head_dim, eps=1e-6)
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, h: torch.Tensor, inputs: PackedInputs, attention: AttentionFunction) -> torch.Tensor:
        """The block's normalised tokens [L, E] -> what is added to its stream, [L, E]."""
        q, k, v = (
            layer(h).unflatten(-1, (-1, self.head_dim)) for layer in (self.query, self.key, self.value)
        )
        q, k = self.norm_q(q), self.norm_k(k)
        cos, sin = (inputs.cos, inputs.sin) if inputs.clip_cos is None else (inputs.clip_cos, inputs.clip_sin)
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = self.norm_out(attention(q, k, v, inputs.clip_seqlens, inputs.max_clip))
        added: torch.Tensor = self.gate.tanh() * self.out(out.flatten(1))
        return added


@torch.library.custom_op("latentpress::linear_attention", mutates_args=())
def _linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor
) -> torch.Tensor:
    """One operation, so that compiled blocks neither break at the loop nor grow with it."""
    out = torch.empty_like(q)
    for start, end in itertools.pairwise(host_bounds(bounds)):
        state = torch.einsum("lnd,lne->nde", k[start:end], v[start:end]) / (end - start)
        out[start:end] = torch.einsum("lnd,nde->lne", q[start:end], state)
    return out


@_linear_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    """The form is the same in all three: sum over i, j of (q_i . k_j) (v_j . gradient_i) / n."""
    q, k, v, bounds = ctx.saved_tensors
    return (
        _linear_attention(gradient, v, k, bounds),
        _linear_attention(v, gradient, q, bounds),
        _linear_attention(k, q, gradient, bounds),
        None,
    )


_linear_attention.register_autograd(_backward, setup_context=_keep)


def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """[L, N, D] each -> [L, N, D]: for each token the mean over its clip of (q . k) v.

    Softmax attention without the softmax (https://arxiv.org/abs/2006.16236), so that keys and values come
    first: sum(k v^T) is one [D, D] per head. It has no denominator, since the layer norms its output
    (https://arxiv.org/abs/2210.10340), so rotary positions keep their meaning.
    """
    return _linear_attention(q, k, v, cu_seqlens)
