"""The packed model against stock diffusers: loss, gradients, isolation of clips, packing, spans."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

from schemas.errors import ConfigError
from tests.trainer.stock import (
    CONFIGS,
    clips_for,
    pack_inputs,
    packed_model,
    stock_loss,
    stock_model,
    stock_rotary,
    tiny_architecture,
)
from trainer.collate import PackedInputs, collate
from trainer.model import check_supported
from trainer.modulation import rows_of
from trainer.packing import Segment
from trainer.positions import rotary_table


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def packed_loss(model: torch.nn.Module, inputs: PackedInputs, target: torch.Tensor) -> torch.Tensor:
    """Mean over each clip, summed over clips."""
    errors = (model(inputs) - target).square().mean(dim=1).split(inputs.video_lengths)
    return torch.stack([clip.mean() for clip in errors]).sum()


@pytest.mark.parametrize("variant", list(CONFIGS))
def test_packed_loss_and_gradients_are_those_of_single_clips_in_stock_diffusers(variant: str) -> None:
    stock, packed = stock_model(variant), packed_model(variant)
    expected = torch.stack([stock_loss(stock, segment) for segment in clips_for(variant)]).sum()
    expected.backward()
    loss = packed_loss(packed, *pack_inputs(clips_for(variant), variant=variant))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted, found = gradients(stock), gradients(packed)
    assert wanted.keys() == dict(stock.named_parameters()).keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, want in wanted.items():
        # Without rotation the bias of norm_k cancels in the softmax: its gradient is rounding alone.
        size = max(want.abs().max(), 1e-3 * largest)
        assert (found[name] - want).abs().max() / size < 5e-6, name


@torch.no_grad()
def test_a_dropped_boundary_rotated_text_or_a_lost_image_would_be_seen_there() -> None:
    """Guards the test above: what it compares depends on all of these."""
    stock, packed = stock_model("1.5-i2v"), packed_model("1.5-i2v")
    segments = clips_for("1.5-i2v")
    expected = sum(stock_loss(stock, segment).item() for segment in segments)
    inputs, target = pack_inputs(segments, variant="1.5-i2v")
    unseen, _ = pack_inputs(
        [dataclasses.replace(segment, image_latents=None) for segment in segments], variant="1.5-i2v"
    )
    merged = dataclasses.replace(inputs)
    object.__setattr__(merged, "cu_seqlens", inputs.cu_seqlens[[0, 2, 3, 4]])  # the container refuses this
    is_text = inputs.modulation_row >= len(inputs.timesteps)
    assert inputs.cos is not None
    assert inputs.sin is not None
    turned = dataclasses.replace(
        inputs,
        cos=torch.where(is_text[:, None], 0.8, inputs.cos),
        sin=torch.where(is_text[:, None], 0.6, inputs.sin),
    )
    for mutant in (merged, turned, unseen):
        loss = packed_loss(packed, mutant, target).item()
        assert loss != pytest.approx(expected, rel=1e-4)
    assert packed_loss(packed, inputs, target).item() == pytest.approx(expected, rel=1e-6)


def test_every_parameter_and_buffer_keeps_its_name() -> None:
    for variant in CONFIGS:
        assert list(packed_model(variant).state_dict()) == list(stock_model(variant).state_dict())
    assert "patch_embed.pos_embedding" in packed_model("5b-i2v").state_dict()


@pytest.mark.parametrize("variant", ["5b", "1.5"])
@pytest.mark.parametrize(("height", "width"), [(12, 16), (16, 8), (8, 20), (14, 14)])
def test_rotary_tables_are_those_of_the_stock_pipeline(variant: str, height: int, width: int) -> None:
    model = CogVideoXTransformer3DModel(**CONFIGS[variant] | {"sample_height": 18, "sample_width": 24})
    expected = stock_rotary(model, frames=4, height=height, width=width)
    patch_t = model.config["patch_size_t"]
    found = rotary_table(
        (4 // (patch_t or 1), height // 2, width // 2), head_dim=16, base=None if patch_t else (9, 12)
    )
    assert expected is not None
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@torch.no_grad()
def outputs(segments: list[Segment], *, variant: str, local_frames: int = 0) -> tuple[torch.Tensor, ...]:
    inputs, _ = pack_inputs(segments, variant=variant, local_frames=local_frames)
    model = packed_model(variant, local_frames=local_frames)
    return torch.split(model(inputs), list(inputs.video_lengths))


@pytest.mark.parametrize("damage", [1.0, float("nan")])
@pytest.mark.parametrize(("variant", "local_frames"), [("5b", 0), ("5b", 2), ("5b-i2v", 0), ("1.5-i2v", 2)])
def test_a_clip_never_reaches_its_neighbours(variant: str, local_frames: int, damage: float) -> None:
    segments = clips_for(variant)
    before = outputs(segments, variant=variant, local_frames=local_frames)
    image = segments[1].image_latents
    segments[1] = dataclasses.replace(
        segments[1],
        latents=segments[1].latents + damage,
        prompt_embeds=segments[1].prompt_embeds + damage,
        image_latents=None if image is None else image + damage,
    )
    after = outputs(segments, variant=variant, local_frames=local_frames)
    for i in (0, 2, 3):
        assert torch.equal(before[i], after[i])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("variant", ["5b", "2b", "5b-i2v", "1.5-i2v"])
def test_the_order_and_the_composition_of_packs_change_nothing(variant: str) -> None:
    segments = clips_for(variant)
    together = outputs(segments, variant=variant)
    backwards = outputs(segments[::-1], variant=variant)[::-1]
    alone = [outputs([segment], variant=variant)[0] for segment in segments]
    for a, b, c in zip(together, backwards, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("variant", "frames"), [("5b", 5), ("2b", 6), ("1.5", 6), ("1.5-i2v", 6)])
def test_spans_are_separate_clips_of_one_timestep(variant: str, frames: int) -> None:
    """A first span of 1 + 2 latent frames, and in 1.5 the filled-up one; then of 2, or what is left."""
    architecture = tiny_architecture(variant, local_frames=2)
    layout = architecture.layout
    model = packed_model(variant, local_frames=2)
    generator = torch.Generator().manual_seed(3)
    clip, other = (torch.randn(frames, 4, 8, 12, generator=generator) for _ in range(2))
    prompt = torch.randn(7, 12, generator=generator)
    images = [other[:1], None] if layout.image else None
    first = 4 if layout.patch_t == 2 else 3
    pieces = [clip[:first], *clip[first:].split(2), other[:first], *other[first:].split(2)]
    pieces_images: list[torch.Tensor | None] = [None] * len(pieces)
    if images:
        pieces_images[0] = images[0]
    cut = collate([clip, other], [prompt] * 2, [500, 100], layout=layout, images=images)
    separate = collate(
        pieces,
        [prompt] * len(pieces),
        [500] * (len(pieces) // 2) + [100] * (len(pieces) // 2),
        layout=dataclasses.replace(layout, local_frames=0),
        images=pieces_images if images else None,
    )
    assert torch.equal(cut.cu_seqlens, separate.cu_seqlens)
    assert len(cut.clip_seqlens) == 3
    torch.testing.assert_close(model(cut), model(separate), rtol=1e-6, atol=1e-6)
    joined = collate(
        [clip, other], [prompt] * 2, [500, 100], layout=tiny_architecture(variant).layout, images=images
    )
    assert not torch.allclose(model(cut), model(joined), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_modulation_are_summed_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3, 5, generator=generator).to(dtype).requires_grad_()
    row = torch.randint(3, (20_000,), generator=generator)
    weight = torch.rand(20_000, 5, generator=generator).to(dtype)
    picked = rows_of(table, row)
    assert torch.equal(picked, table[row])
    (picked * weight).sum().backward()
    expected = torch.zeros(3, 5, dtype=torch.float64).index_add_(0, row, weight.double())
    assert table.grad is not None
    torch.testing.assert_close(table.grad.double(), expected, rtol=max(1e-5, torch.finfo(dtype).eps), atol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"in_channels": 6}, "in_channels 6 for out_channels 4"), ({"dropout": 0.1}, "dropout = 0.1")],
)
def test_what_packing_does_not_cover_is_refused(change: dict[str, object], named: str) -> None:
    config = tiny_architecture("5b").config
    check_supported(config)
    with pytest.raises(ConfigError, match=named):
        check_supported(config | change)
