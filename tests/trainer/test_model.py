"""The packed model against stock diffusers: loss, gradients, isolation of clips, invariance of packing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

from schemas.errors import ConfigError
from tests.trainer.stock import (
    CONFIGS,
    clips,
    pack_inputs,
    packed_model,
    stock_loss,
    stock_model,
    stock_rotary,
)
from trainer.collate import PackedInputs, collate, fill_patches, patchify
from trainer.model import check_supported
from trainer.objective import clip_errors
from trainer.packing import Segment
from trainer.positions import rotary_table


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("variant", list(CONFIGS))
def test_packed_loss_and_gradients_are_those_of_single_clips_in_stock_diffusers(variant: str) -> None:
    stock, packed = stock_model(variant), packed_model(variant)
    expected = torch.stack([stock_loss(stock, segment) for segment in clips()]).sum()
    expected.backward()
    inputs, target = pack_inputs(clips(), variant=variant)
    loss = clip_errors(packed(inputs), target, lengths=inputs.video_lengths).sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted, found = gradients(stock), gradients(packed)
    assert len(wanted) > 60
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, want in wanted.items():
        # Without rotation the bias of norm_k cancels in the softmax: its gradient is rounding alone.
        size = max(want.abs().max(), 1e-3 * largest)
        assert (found[name] - want).abs().max() / size < 5e-6, name


def test_every_parameter_keeps_its_name() -> None:
    for variant in CONFIGS:
        assert list(packed_model(variant).state_dict()) == list(stock_model(variant).state_dict())


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
def outputs(segments: list[Segment]) -> tuple[torch.Tensor, ...]:
    inputs, _ = pack_inputs(segments, variant="5b")
    return torch.split(packed_model("5b")(inputs), list(inputs.video_lengths))


@pytest.mark.parametrize("damage", [1.0, float("nan")])
def test_a_clip_never_reaches_its_neighbours(damage: float) -> None:
    segments = clips()
    before = outputs(segments)
    segments[1] = dataclasses.replace(
        segments[1],
        latents=segments[1].latents + damage,
        prompt_embeds=segments[1].prompt_embeds + damage,
    )
    after = outputs(segments)
    for i in (0, 2, 3):
        assert torch.equal(before[i], after[i])
    assert not torch.equal(before[1], after[1])


def test_the_order_and_the_composition_of_packs_change_nothing() -> None:
    segments = clips()
    together = outputs(segments)
    backwards = outputs(segments[::-1])[::-1]
    alone = [outputs([segment])[0] for segment in segments]
    for a, b, c in zip(together, backwards, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-6)


def test_a_dropped_boundary_or_rotated_text_would_be_seen() -> None:
    """Guards the tests above: what they compare does depend on boundaries and on unrotated text."""
    inputs, target = pack_inputs(clips(), variant="5b")
    model = packed_model("5b")

    def loss(inputs: PackedInputs) -> float:
        return clip_errors(model(inputs), target, lengths=[len(target)]).item()

    whole = torch.tensor([0, len(inputs.order)], dtype=torch.int32)
    merged = dataclasses.replace(inputs)
    object.__setattr__(merged, "cu_seqlens", whole)  # the container itself refuses this
    is_text = inputs.modulation_row >= len(inputs.timesteps)
    assert inputs.cos is not None
    assert inputs.sin is not None
    turned = dataclasses.replace(
        inputs,
        cos=torch.where(is_text[:, None], 0.8, inputs.cos),
        sin=torch.where(is_text[:, None], 0.6, inputs.sin),
    )
    for mutant in (merged, turned):
        assert loss(mutant) != pytest.approx(loss(inputs), rel=1e-4)


def test_a_pack_whose_parts_disagree_is_refused() -> None:
    inputs, _ = pack_inputs(clips(), variant="5b")
    for change in (
        {"max_seqlen": 3},
        {"cu_seqlens": inputs.cu_seqlens[[0, -1]]},
        {"video": inputs.video[:-1]},
        {"cos": inputs.cos[:-1] if inputs.cos is not None else None},
    ):
        with pytest.raises(ValueError, match="parts disagree"):
            dataclasses.replace(inputs, **change)
    with pytest.raises(ValueError, match="must rise strictly"):
        dataclasses.replace(inputs, cu_seqlens=inputs.cu_seqlens.flip(0))
    with pytest.raises(ValueError, match="as many of each"):
        collate([], [torch.zeros(1, 2)], [0], config=None)


def test_patches_are_cut_in_the_order_of_the_embedding() -> None:
    latents = torch.randn(4, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    conv = torch.nn.Conv2d(3, 5, kernel_size=2, stride=2)
    expected = conv(latents).flatten(2).transpose(1, 2).flatten(0, 1)
    found = torch.nn.functional.linear(
        patchify(latents, patch=2, patch_t=1), conv.weight.flatten(1), conv.bias
    )
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="multiples of the patch"):
        patchify(latents[:3], patch=2, patch_t=2)
    filled = fill_patches(latents[:3], patch_t=2)
    assert torch.equal(filled, torch.cat([latents[:1], latents[:3]]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"in_channels": 8}, "image conditioning"),
        ({"ofs_embed_dim": 16}, "ofs_embed_dim = 16"),
        ({"use_learned_positional_embeddings": True}, "use_learned_positional_embeddings"),
        ({"dropout": 0.1}, "dropout = 0.1"),
    ],
)
def test_what_packing_does_not_cover_is_refused(change: dict[str, object], named: str) -> None:
    check_supported(CONFIGS["5b"])
    with pytest.raises(ConfigError, match=named):
        check_supported(CONFIGS["5b"] | change)
