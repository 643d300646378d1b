"""Packed attention: routes against the written-out reference, refusals, the start-up probe."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from schemas.errors import RunError
from trainer import attention
from trainer.attention import choose_attention, probe, sdpa, segment_lengths

CPU = torch.device("cpu")


def choose(setting: str = "auto") -> attention.Attention:
    return choose_attention(setting, device=CPU, dtype=torch.float32, heads=2, head_dim=16)


def one_span(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """A wrong route: every clip sees its neighbours."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1)


@pytest.mark.parametrize("head_dim", [16, 64])
def test_sdpa_agrees_with_the_reference_forward_and_backward(head_dim: int) -> None:
    assert probe(sdpa, device=CPU, dtype=torch.float32, heads=3, head_dim=head_dim) < 2e-6


def test_the_probe_tells_a_route_that_crosses_segments() -> None:
    assert probe(one_span, device=CPU, dtype=torch.float32, heads=2, head_dim=16) > 0.1


def test_the_choice_is_explained() -> None:
    assert choose("auto").reason.startswith("auto on cpu")
    assert choose("sdpa").reason.startswith("set by model.attention")


@pytest.mark.parametrize("route", [one_span, lambda *inputs: sdpa(*inputs) * float("nan")])
def test_a_wrong_route_is_refused_at_start(
    monkeypatch: pytest.MonkeyPatch, route: attention.AttentionFunction
) -> None:
    monkeypatch.setitem(attention.ROUTES, "sdpa", route)
    with pytest.raises(RunError, match="'sdpa' disagrees with the float32 reference"):
        choose("auto")


@pytest.mark.parametrize("bounds", [[0, 5, 3, 8], [1, 5, 8], [0, 5, 7], [0, 5, 9], [0, 4, 4, 8], [0], []])
def test_wrong_bounds_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="must rise strictly from 0 to the number of tokens, 8"):
        segment_lengths(bounds, num_tokens=8)
    x = torch.zeros(8, 1, 4)
    with pytest.raises(ValueError, match="must rise strictly"):
        sdpa(x, x, x, torch.tensor(bounds, dtype=torch.int32), 8)


def test_segments_are_what_they_would_be_alone() -> None:
    bounds = [0, 3, 4, 11]
    q, k, v = torch.randn(3, 11, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    packed = sdpa(q, k, v, torch.tensor(bounds, dtype=torch.int32), 7)
    for start, end in itertools.pairwise(bounds):
        alone = torch.tensor([0, end - start], dtype=torch.int32)
        torch.testing.assert_close(
            packed[start:end], sdpa(q[start:end], k[start:end], v[start:end], alone, end - start)
        )
