"""Packed attention: routes against the written-out reference, refusals, the start-up probe."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from schemas.errors import RunError
from trainer import attention, probe, routes
from trainer.attention import CrossAttentionFunction, sdpa, sdpa_cross, segment_lengths
from trainer.probe import choose_attention, reference, try_route

CPU = torch.device("cpu")


def choose(setting: str = "auto", *, device: torch.device = CPU) -> attention.Attention:
    return choose_attention(setting, device=device, dtype=torch.float32, heads=2, head_dim=16)


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def one_span(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bounds: Any) -> torch.Tensor:
    """A wrong route: every clip sees its neighbours."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1)


def bounds_of_queries(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """A wrong route: keys lie where queries lie, which is right within a stream and wrong across two."""
    grown = torch.cat([k, k.new_zeros(len(q), *k.shape[1:])])[: len(q)]
    values = torch.cat([v, v.new_zeros(len(q), *v.shape[1:])])[: len(q)]
    return sdpa(q, grown, values, cu_q, 0)


def no_gradient_of_keys(*inputs: Any) -> torch.Tensor:
    """A wrong route: its output is right, and its backward pass is not."""
    q, k, *rest = inputs
    return sdpa_cross(q, k.detach() + 0 * k, *rest)


@pytest.mark.parametrize("head_dim", [16, 64])
def test_sdpa_agrees_with_the_reference_forward_and_backward(head_dim: int) -> None:
    assert probe.probe(sdpa_cross, device=CPU, dtype=torch.float32, heads=3, head_dim=head_dim) < 3e-6


def test_the_choice_is_explained() -> None:
    assert choose("auto").reason.startswith("auto on cpu; probe error")
    assert choose("sdpa").reason.startswith("set by model.attention")


WRONG: list[CrossAttentionFunction] = [
    one_span,
    bounds_of_queries,
    no_gradient_of_keys,
    lambda *inputs: sdpa_cross(*inputs) * float("nan"),
]


@pytest.mark.parametrize("route", WRONG)
def test_a_wrong_route_is_refused_at_start(
    monkeypatch: pytest.MonkeyPatch, route: CrossAttentionFunction
) -> None:
    monkeypatch.setitem(routes.ROUTES, "sdpa", lambda: route)
    with pytest.raises(
        RunError, match=r"no attention route works.*sdpa: disagrees with the float32 reference"
    ):
        choose("auto")


def test_auto_takes_the_next_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "candidates", lambda device: ("flash_attn_3", "varlen", "flex", "sdpa"))
    monkeypatch.setitem(routes.ROUTES, "flex", lambda: one_span)
    chosen = choose("auto")
    assert chosen.name == "sdpa"
    assert "flash_attn_3: No module named 'flash_attn_interface'; varlen: Could not run" in chosen.reason
    assert "flex: disagrees with the float32 reference: relative error" in chosen.reason
    assert len(chosen.reason) < 700


@pytest.mark.parametrize("name", ["flash_attn_3", "flash_attn_2", "varlen"])
def test_a_route_that_was_asked_for_never_falls_back(name: str) -> None:
    with pytest.raises(RunError, match=rf"model.attention = '{name}': no attention route works .*\({name}: "):
        choose(name)


@pytest.mark.parametrize(("major", "first"), [(9, "flash_attn_3"), (8, "varlen"), (10, "varlen")])
def test_gpus_have_their_own_order(monkeypatch: pytest.MonkeyPatch, major: int, first: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert probe.candidates(torch.device("cuda"))[0] == first


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    ("name", "module"), [("flash_attn_3", "flash_attn_interface"), ("flash_attn_2", "flash_attn")]
)
def test_the_flash_packages_are_told_to_be_deterministic(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, deterministic: bool
) -> None:
    told: list[dict[str, Any]] = []

    def flash_attn_varlen_func(q: Any, k: Any, v: Any, **given: Any) -> Any:
        told.append(given)
        order = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        out = sdpa_cross(q, k, v, *(given[key] for key in order))
        return (out, None) if name == "flash_attn_3" else out

    package = ModuleType(module)
    monkeypatch.setattr(package, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False)
    monkeypatch.setitem(sys.modules, module, package)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert choose(name).name == name
    finally:
        torch.use_deterministic_algorithms(before)
    assert {given["deterministic"] for given in told} == {deterministic}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["varlen", "flex", "sdpa"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_routes_on_a_gpu(name: str, head_dim: int) -> None:
    cuda = torch.device("cuda")
    found = try_route(name, device=cuda, dtype=torch.bfloat16, heads=4, head_dim=head_dim)
    assert not isinstance(found, str), found


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["varlen", "flex", "sdpa"])
def test_deterministic_backward_repeats_bit_for_bit(name: str) -> None:
    lengths = [3000, 1, 777]
    cu = bounds(lengths).cuda()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        cross = routes.ROUTES[name]()
        q, k, v = torch.randn(3, sum(lengths), 8, 64, device="cuda", dtype=torch.bfloat16).unbind()
        runs = []
        for _ in range(3):
            a, b, c = (x.clone().requires_grad_() for x in (q, k, v))
            out = cross(a, b, c, cu, cu, max(lengths), max(lengths))
            runs.append(torch.autograd.grad(out.float().square().sum(), (a, b, c)))
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("wrong", [[0, 5, 3, 8], [1, 5, 8], [0, 5, 7], [0, 5, 9], [0, 4, 4, 8], [0], []])
def test_wrong_bounds_are_refused(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match="must rise strictly from 0 to the number of tokens, 8"):
        segment_lengths(wrong, num_tokens=8)
    x = torch.zeros(8, 1, 4)
    with pytest.raises(ValueError, match="must rise strictly"):
        sdpa(x, x, x, torch.tensor(wrong, dtype=torch.int32), 8)


def test_segments_are_what_they_would_be_alone() -> None:
    edges = [0, 3, 4, 11]
    q, k, v = torch.randn(3, 11, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    packed = sdpa(q, k, v, torch.tensor(edges, dtype=torch.int32), 7)
    for start, end in itertools.pairwise(edges):
        alone = torch.tensor([0, end - start], dtype=torch.int32)
        torch.testing.assert_close(
            packed[start:end], sdpa(q[start:end], k[start:end], v[start:end], alone, end - start)
        )


Lengths = tuple[list[int], list[int]]
SEGMENTS: list[Lengths] = [
    ([5, 1, 131, 17, 300], [3, 200, 9, 1, 128]),
    ([128, 256, 1], [1, 128, 129]),
    ([7], [400]),
    ([400, 3, 3, 3], [2, 2, 2, 130]),
]


@pytest.mark.parametrize(("queries", "keys"), [*SEGMENTS, *((q, q) for q, _ in SEGMENTS)])
def test_the_mask_from_bounds_is_the_one_from_every_pair(queries: list[int], keys: list[int]) -> None:
    mask = routes.segment_mask(bounds(queries), bounds(keys), num_q=sum(queries), num_k=sum(keys))
    expected = create_block_mask(mask.mask_mod, None, None, sum(queries), sum(keys), device="cpu")
    assert mask.shape == expected.shape
    for way in ("kv", "q"):
        for kind in ("", "full_"):
            counts, wanted = (getattr(m, f"{kind}{way}_num_blocks") for m in (mask, expected))
            assert torch.equal(counts, wanted)
            which, those = (getattr(m, f"{kind}{way}_indices") for m in (mask, expected))
            for row, other, count in zip(which[0, 0], those[0, 0], counts[0, 0], strict=True):
                assert torch.equal(row[:count], other[:count])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_agrees_with_the_reference_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward pass is for GPUs only."""
    compiled: list[Callable[..., Any]] = []
    compile = torch.compile

    def note(function: Callable[..., Any], **options: Any) -> Any:
        if options:  # flex attention's own, by which it runs as it is
            return compile(function, **options)
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", note)
    made: list[Any] = []
    segment_mask = routes.segment_mask

    def count(*given: Any, **sizes: Any) -> Any:
        made.append(given)
        return segment_mask(*given, **sizes)

    monkeypatch.setattr(routes, "segment_mask", count)
    flex = routes.ROUTES["flex"]()
    assert compiled == [flex_attention]
    assert torch._dynamo.config.fail_on_recompile_limit_hit
    queries, keys = SEGMENTS[0]
    q = torch.randn(sum(queries), 2, 16)
    k, v = torch.randn(2, sum(keys), 2, 16).unbind()
    rest = bounds(queries), bounds(keys), max(queries), max(keys)
    for _ in range(3):  # blocks of a model share one mask per pack
        torch.testing.assert_close(flex(q, k, v, *rest), reference(q, k, v, *rest))
    assert len(made) == 1
    flex(q, k, v, rest[0].clone(), *rest[1:])
    assert len(made) == 2
