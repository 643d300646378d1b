"""The diffusion transformer on packs against a plain one written here, which takes one clip at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

from schemas.errors import ConfigError
from tests.trainer.stock import SDPA, clips, packed_model, tiny_architecture
from trainer.architecture import Architecture
from trainer.collate import PackedInputs, collate
from trainer.layout import fill_patches
from trainer.long_context import linear_attention
from trainer.model import PackedModel, build_model
from trainer.objective import Schedule
from trainer.packing import Segment

Weights = dict[str, torch.Tensor]
HEADS, HEAD_DIM = 2, 16
TIMESTEPS = (900, 17, 333, 480)


@dataclass(frozen=True)
class Variant:
    """What the tests go through; the defaults are the plainest model."""

    text: Literal["joint", "cross"] = "joint"
    patch_t: int = 1
    image: bool = False
    local_frames: int = 0
    long_context: Literal["none", "linear"] = "none"


VARIANTS = (
    Variant(),
    Variant(text="cross", image=True),
    Variant(patch_t=2, image=True, local_frames=2, long_context="linear"),
    Variant(text="cross", local_frames=1, long_context="linear"),
)


def dit_architecture(variant: Variant) -> Architecture:
    config: dict[str, Any] = {
        "num_layers": 2,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "time_embed_dim": 24,
        "in_channels": 8 if variant.image else 4,
        "out_channels": 4,
        "text_embed_dim": 12,
        "max_text_seq_length": 7,
        "patch_size": 2,
        "patch_size_t": variant.patch_t,
        "text": variant.text,
    }
    return Architecture(
        "dit", config, Schedule(), local_frames=variant.local_frames, long_context=variant.long_context
    )


def with_random_weights(model: PackedModel) -> PackedModel:
    """All weights random: also those that start at 0 or 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1)
    return model


def dit_model(variant: Variant) -> PackedModel:
    return with_random_weights(build_model(dit_architecture(variant), SDPA))


def dit_clips(variant: Variant) -> list[Segment]:
    """Clips with prompts of different lengths; with image conditions where the variant takes them."""
    made = clips(((3, 12, 16, 7), (1, 8, 12, 3), (5, 16, 8, 1), (2, 8, 8, 5)))
    if variant.image:
        made[:-1] = [replace(clip, image_latents=clip.latents[:1] * 0.5) for clip in made[:-1]]
    return made


def pack(segments: Sequence[Segment], variant: Variant) -> PackedInputs:
    layout = dit_architecture(variant).layout
    return collate(
        [fill_patches(segment.latents, patch_t=variant.patch_t) for segment in segments],
        [segment.prompt_embeds for segment in segments],
        [TIMESTEPS[int(segment.sample_id[-1])] for segment in segments],
        layout=layout,
        images=[segment.image_latents for segment in segments] if variant.image else None,
    )


def plain_dit(weights: Weights, segment: Segment, variant: Variant) -> torch.Tensor:
    """One clip through the same transformer, from the papers' formulas: [V, P]."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        out = x @ weights[f"{name}.weight"].T
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    def norm(x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def head_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), HEADS, HEAD_DIM)

    def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("qnd,knd->nqk", q, k) / HEAD_DIM**0.5
        return torch.einsum("nqk,knd->qnd", scores.softmax(-1), v).flatten(1)

    def turned(x: torch.Tensor, places: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """Pairs of channels as complex numbers: a quarter is turned by time, the rest by height and width."""
        axes = [(HEAD_DIM // 4, 0), (HEAD_DIM * 3 // 8, 1), (HEAD_DIM * 3 // 8, 2)]
        angles = [
            [place[axis] * 10000.0 ** (-2 * i / size) for size, axis in axes for i in range(size // 2)]
            for place in places
        ]
        turn = torch.polar(torch.ones(len(places), HEAD_DIM // 2), torch.tensor(angles))
        pairs = torch.view_as_complex(x.reshape(len(x), HEADS, -1, 2))
        return torch.view_as_real(pairs * turn[:, None]).flatten(2)

    def in_video_rows(
        x: torch.Tensor, span_text: int, places: Sequence[tuple[int, int, int]]
    ) -> torch.Tensor:
        return torch.cat([x[:span_text], turned(x[span_text:], places)])

    # Patches, and where each lies.
    latents = fill_patches(segment.latents, patch_t=variant.patch_t)
    if variant.image:
        image = torch.zeros_like(latents)
        if segment.image_latents is not None:
            image[:1] = segment.image_latents
        latents = torch.cat([latents, image], dim=1)
    frames, height, width = latents.shape[0] // variant.patch_t, latents.shape[2] // 2, latents.shape[3] // 2
    places = [(t, y, x) for t in range(frames) for y in range(height) for x in range(width)]
    video = torch.stack(
        [
            latents[t * variant.patch_t : (t + 1) * variant.patch_t, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            .transpose(0, 1)
            .flatten()
            for t, y, x in places
        ]
    )
    # Spans: the first has a leading frame more.
    local = variant.local_frames // variant.patch_t or frames
    starts = [0, *range(1 + local, frames, local)] if variant.local_frames else [0]
    bounds = [start * height * width for start in starts] + [len(places)]
    # Conditions.
    timestep = TIMESTEPS[int(segment.sample_id[-1])]
    waves = timestep * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = torch.cat([waves.cos(), waves.sin()])[None]
    time = linear(F.silu(linear(time, "time_embedding.linear_1")), "time_embedding.linear_2")
    prompt = F.gelu(linear(segment.prompt_embeds, "text_projector.linear_1"), approximate="tanh")
    prompt = linear(prompt, "text_projector.linear_2")

    x = linear(video, "patch_embed")
    shown = len(prompt) if variant.text == "joint" else 0
    stream = [torch.cat([prompt[:shown], x[a:b]]) for a, b in itertools.pairwise(bounds)]
    for i in range(2):
        at = f"transformer_blocks.{i}"
        modulation = [linear(F.silu(time), f"{at}.norm{n}.linear")[0].view(-1, 3, x.shape[1]) for n in (1, 2)]

        def modulated(
            span: torch.Tensor, tables: torch.Tensor, shown: int = shown
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rows = tables[[1] * shown + [0] * (len(span) - shown)]
            return norm(span) * (1 + rows[:, 1]) + rows[:, 0], rows[:, 2]

        normed = [modulated(span, modulation[0]) for span in stream]
        added = []
        for (h, gate), a in zip(normed, bounds, strict=False):
            here = [(t - places[a][0], y, x) for t, y, x in places[a : a + len(h) - shown]]
            q, k, v = (heads(linear(h, f"{at}.attn1.to_{part}")) for part in "qkv")
            q, k = head_norm(q, f"{at}.attn1.norm_q"), head_norm(k, f"{at}.attn1.norm_k")
            out = softmax_attention(in_video_rows(q, shown, here), in_video_rows(k, shown, here), v)
            added.append(gate * linear(out, f"{at}.attn1.to_out.0"))
        if variant.long_context == "linear":
            at_layer = f"{at}.long_context"
            parts = []
            for (h, _), a in zip(normed, bounds, strict=False):
                q, k, v = (heads(linear(h, f"{at_layer}.{part}")) for part in ("query", "key", "value"))
                q, k = head_norm(q, f"{at_layer}.norm_q"), head_norm(k, f"{at_layer}.norm_k")
                there = places[a : a + len(h) - shown]
                parts.append((in_video_rows(q, shown, there), in_video_rows(k, shown, there), v))
            queries, keys, values = (torch.cat(part) for part in zip(*parts, strict=True))
            scores = torch.einsum("qnd,knd->nqk", queries, keys) / len(queries)
            out = head_norm(torch.einsum("nqk,knd->qnd", scores, values), f"{at_layer}.norm_out")
            out = weights[f"{at_layer}.gate"].tanh() * linear(out.flatten(1), f"{at_layer}.out")
            pieces = out.split([len(part) for part in added])
            added = [a + b for a, b in zip(added, pieces, strict=True)]
        stream = [span + part for span, part in zip(stream, added, strict=True)]
        if variant.text == "cross":
            scale, bias = (weights[f"{at}.norm_cross.{part}"] for part in ("weight", "bias"))
            k, v = (heads(linear(prompt, f"{at}.cross.to_{part}")) for part in "kv")
            k = head_norm(k, f"{at}.cross.norm_k")
            for n, span in enumerate(stream):
                q = heads(linear(norm(span) * scale + bias, f"{at}.cross.to_q"))
                out = softmax_attention(head_norm(q, f"{at}.cross.norm_q"), k, v)
                stream[n] = span + linear(out, f"{at}.cross.to_out.0")
        for n, span in enumerate(stream):
            h, gate = modulated(span, modulation[1])
            h = F.gelu(linear(h, f"{at}.ff.net.0.proj"), approximate="tanh")
            stream[n] = span + gate * linear(h, f"{at}.ff.net.2")
    shift, scale = linear(F.silu(time), "norm_out.linear")[0].chunk(2)
    return linear(norm(torch.cat([span[shown:] for span in stream])) * (1 + scale) + shift, "proj_out")


@pytest.mark.parametrize("variant", VARIANTS)
def test_packs_are_single_clips_in_a_plain_transformer(variant: Variant) -> None:
    model, segments = dit_model(variant), dit_clips(variant)
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    expected = torch.cat([plain_dit(weights, segment, variant) for segment in segments])
    found = model(pack(segments, variant))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    largest = max(float(value.grad.abs().max()) for value in weights.values() if value.grad is not None)
    for name, parameter in model.named_parameters():
        want, have = weights[name].grad, parameter.grad
        assert want is not None, name
        assert have is not None, name
        assert (have - want).abs().max() <= 1e-5 * max(float(want.abs().max()), 1e-2 * largest), name


@torch.no_grad()
@pytest.mark.parametrize("damage", [1.0, float("nan")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_clip_never_reaches_its_neighbours(variant: Variant, damage: float) -> None:
    model, segments = dit_model(variant), dit_clips(variant)

    def outputs() -> tuple[torch.Tensor, ...]:
        inputs = pack(segments, variant)
        return torch.split(model(inputs), list(inputs.video_lengths))

    before = outputs()
    segments[2] = replace(
        segments[2],
        latents=segments[2].latents + damage,
        prompt_embeds=segments[2].prompt_embeds + damage,
    )
    after = outputs()
    for i in (0, 1, 3):
        assert torch.equal(before[i], after[i])
    assert not torch.equal(before[2], after[2])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dit", "cogvideox"])
def test_long_context_changes_nothing_until_its_gate_opens_and_then_joins_spans(kind: str) -> None:
    """Published weights keep their output; and only the open gate brings one span's content to another."""
    architecture = (
        dit_architecture(Variant(local_frames=2))
        if kind == "dit"
        else tiny_architecture("5b", local_frames=2)
    )
    plain = with_random_weights(build_model(architecture, SDPA))
    joined = with_random_weights(build_model(replace(architecture, long_context="linear"), SDPA))
    missing = joined.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert len(missing) == 2 * 8
    assert all(".long_context." in name for name in missing)
    clip = clips(((5, 8, 8, 7),))[0]
    changed = clip.latents.clone()
    changed[0] += 1

    def last_span(model: PackedModel, latents: torch.Tensor) -> torch.Tensor:
        inputs = collate([latents], [clip.prompt_embeds], [500], layout=model.layout)
        assert len(inputs.cu_seqlens) == 3
        out: torch.Tensor = model(inputs)[-2 * 16 :]
        return out

    expected = last_span(plain, clip.latents)
    assert torch.equal(last_span(plain, changed), expected)
    assert not torch.allclose(last_span(joined, clip.latents), expected, atol=1e-3)
    assert not torch.allclose(last_span(joined, changed), last_span(joined, clip.latents), atol=1e-4)
    for block in joined.transformer_blocks:
        torch.nn.init.zeros_(block.get_parameter("long_context.gate"))
    assert torch.equal(last_span(joined, clip.latents), expected)


def test_linear_attention_is_attention_without_the_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, direction = torch.randn(4, 9, 2, 4, generator=generator, dtype=torch.float64)
    bounds = torch.tensor([0, 3, 4, 9], dtype=torch.int32)

    def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = [
            torch.einsum("qnd,knd,kne->qne", q[a:b], k[a:b], v[a:b]) / (b - a)
            for a, b in ((0, 3), (3, 4), (4, 9))
        ]
        return torch.cat(parts)

    def run(function: Any) -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        return [out, *torch.autograd.grad((out * direction).sum(), inputs)]

    found = run(lambda q, k, v: linear_attention(q, k, v, bounds, 5))
    for a, b in zip(found, run(written_out), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_long_context_compiles_without_a_break() -> None:
    """The loop over clips is one operation to the compiler, whatever their number and lengths."""
    compiled = torch.compile(linear_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ((3, 4), (2, 2, 5)):
        total = sum(lengths)
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        generator = torch.Generator().manual_seed(0)
        qkv = [torch.randn(total, 2, 4, generator=generator).requires_grad_() for _ in range(3)]
        results = []
        for function in (compiled, linear_attention):
            out = function(qkv[0], qkv[1], qkv[2], bounds, max(lengths))
            results.append((out, *torch.autograd.grad(out.sum(), qkv)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_an_unknown_place_for_text_is_refused() -> None:
    architecture = dit_architecture(Variant())
    with pytest.raises(ConfigError, match="expected text = 'joint' or 'cross', found 'beside'"):
        build_model(replace(architecture, config=architecture.config | {"text": "beside"}), SDPA)


def test_both_kinds_have_the_interface_of_the_loop() -> None:
    for model in (dit_model(Variant()), packed_model("5b")):
        assert model.layout.width == HEADS * HEAD_DIM
        assert len(model.transformer_blocks) == 2
