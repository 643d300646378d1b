"""Adapters: where they go, that they start without effect, and that merged they are the same function."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from schemas.errors import ConfigError
from schemas.train_config import LoraConfig
from tests.trainer.stock import clips, pack_inputs, packed_model
from tests.trainer.test_dit import Variant, dit_clips, dit_model, pack
from trainer.collate import PackedInputs
from trainer.lora import adapted_layers, add_adapters, lora_scale, merged_delta
from trainer.weights import initial_values


def fill_adapters(model: nn.Module, *, seed: int | None) -> None:
    """Their first values, or with a seed, values that have an effect."""
    shapes = {name: value.shape for name, value in model.named_parameters() if ".lora_" in name}
    generator = torch.Generator().manual_seed(seed or 0)
    read = initial_values("random", model, seed=0)
    with torch.no_grad():
        for name, shape in shapes.items():
            first = read(name, tuple(slice(0, size) for size in shape))
            value = first if seed is None else torch.randn(shape, generator=generator) * 0.3
            model.get_parameter(name).copy_(value)


def models() -> dict[str, tuple[nn.Module, PackedInputs]]:
    cross = Variant(text="cross", image=True)
    return {
        "cogvideox": (packed_model("5b"), pack_inputs(clips(), variant="5b")[0]),
        "dit": (dit_model(cross), pack(dit_clips(cross), cross)),
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cogvideox", "dit"])
def test_adapters_start_without_effect_and_merged_they_are_the_same_function(kind: str) -> None:
    model, inputs = models()[kind]
    plain, _ = models()[kind]
    expected = plain(inputs)
    lora = LoraConfig(
        targets=("to_q", "to_v", r"to_out\.0", r"net\.2", "text_proj|linear_2"), rank=3, alpha=6.0
    )
    layers = add_adapters(model, lora)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if ".lora_" not in name] == [name for name, _ in plain.named_parameters()]
    assert adapted_layers(dict.fromkeys(names)) == layers
    fill_adapters(model, seed=None)
    assert torch.equal(model(inputs), expected)
    assert all(model.get_parameter(f"{layer}.lora_A.weight").std() > 0.01 for layer in layers)

    fill_adapters(model, seed=1)
    with_adapters = model(inputs)
    assert not torch.allclose(with_adapters, expected, atol=1e-2)
    values = model.state_dict()
    for layer in layers:
        plain.get_parameter(f"{layer}.weight").add_(merged_delta(values, layer, scale=lora_scale(lora)))
    torch.testing.assert_close(plain(inputs), with_adapters, rtol=1e-4, atol=1e-4)


def test_only_adapters_and_what_is_not_frozen_have_gradients() -> None:
    model, inputs = models()["cogvideox"]
    layers = add_adapters(model, LoraConfig(rank=2))
    assert len(layers) == 2 * 4
    fill_adapters(model, seed=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    model(inputs).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".lora_" in name), name


def test_the_scale_is_alpha_over_rank() -> None:
    assert lora_scale(LoraConfig(rank=8)) == 1
    assert lora_scale(LoraConfig(rank=8, alpha=4.0)) == 0.5


def test_the_patch_embedding_of_two_frames_has_no_adapters() -> None:
    """There it is a linear layer, but the packed model uses its matrix alone."""
    assert isinstance(packed_model("1.5").get_submodule("patch_embed.proj"), nn.Linear)
    with pytest.raises(ConfigError, match="is the end of no name"):
        add_adapters(packed_model("1.5"), LoraConfig(targets=(r"patch_embed\.proj",)))


def test_a_target_is_a_whole_regex() -> None:
    model = packed_model("5b")
    layers = add_adapters(model, LoraConfig(targets=("(?i)TO_Q|to_k",), rank=2))
    assert layers == [f"transformer_blocks.{i}.attn1.to_{part}" for i in (0, 1) for part in "kq"]


@pytest.mark.parametrize(
    ("target", "closest"),
    [
        ("to_kv", r"attn1\.to_"),
        ("o_q", r"attn1\.to_q"),  # a name ends with it, but not at a dot
        ("norm_q", r"attn1"),  # no linear layer
        ("embed.proj", r"patch_embed\.text_proj"),  # used as a matrix, so an adapter would do nothing
    ],
)
def test_a_target_that_finds_nothing_is_refused(target: str, closest: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora\.targets\.1 = '{target}' is the end of no name.*{closest}"):
        add_adapters(packed_model("5b"), LoraConfig(targets=("to_q", target)))


def test_long_context_has_no_adapters() -> None:
    model = dit_model(dataclasses.replace(Variant(), long_context="linear"))
    with pytest.raises(ConfigError, match="is the end of no name"):
        add_adapters(model, LoraConfig(targets=("query",)))
