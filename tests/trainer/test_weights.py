"""First weights: read by slices and strictly, buffers too; drawn by name where there are none."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from schemas.errors import ConfigError
from tests.trainer.stock import CONFIGS, SDPA, packed_model, stock_model, tiny_architecture
from tests.trainer.test_dit import Variant, dit_model
from trainer.model import PackedModel, build_model
from trainer.model_folder import WEIGHTS
from trainer.weights import initial_values


def whole(model: torch.nn.Module, init: str, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """All values, read in two slices."""
    read = initial_values(init, model, seed=seed)
    return {
        name: torch.cat([read(name, (slice(0, 1),)), read(name, (slice(1, len(value)),))])
        for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize("variant", list(CONFIGS))
def test_what_diffusers_saved_is_read_value_for_value(variant: str, tmp_path: Path) -> None:
    stock_model(variant).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = build_model(tiny_architecture(variant), SDPA)
    expected = packed_model(variant).state_dict()
    found = whole(model, str(tmp_path))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_buffer_that_is_missing_is_refused(tmp_path: Path) -> None:
    stock_model("5b-i2v").save_pretrained(tmp_path)
    file = tmp_path / f"{WEIGHTS}.safetensors"
    weights = load_file(file)
    del weights["patch_embed.pos_embedding"]
    save_file(weights, file)
    with pytest.raises(ConfigError, match=r"1 differences\): patch_embed\.pos_embedding is missing"):
        initial_values(str(tmp_path), packed_model("5b-i2v"), seed=0)


def test_a_pipeline_folder_in_several_files_is_read(tmp_path: Path) -> None:
    stock = stock_model("2b")
    stock.save_pretrained(tmp_path / "transformer", max_shard_size="40KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    found = whole(stock, str(tmp_path))
    assert all(torch.equal(found[name], value) for name, value in stock.state_dict().items())


def test_weights_that_are_not_what_the_config_says_are_refused(tmp_path: Path) -> None:
    stock_model("5b").save_pretrained(tmp_path)
    file = tmp_path / f"{WEIGHTS}.safetensors"
    weights = load_file(file)
    weights["lora.extra"] = torch.zeros(1)
    weights["proj_out.bias"] = torch.zeros(3)
    del weights["norm_final.weight"]
    save_file(weights, file)
    with pytest.raises(ConfigError, match="3 differences") as caught:
        initial_values(str(tmp_path), packed_model("5b"), seed=0)
    for part in (
        "lora.extra is unknown",
        "norm_final.weight is missing",
        "proj_out.bias: expected (16,), found (3,)",
    ):
        assert part in str(caught.value)


def test_random_weights_start_as_the_identity() -> None:
    """Norms at 1; biases, and what adds to the stream through a gate, at 0; the rest by its inputs' width."""
    values = whole(dit_model(Variant(text="cross", long_context="linear")), "random")
    zero = r"(norm\w*\.linear|proj_out|cross\.to_out\.0)\.weight$|\.(bias|gate)$"
    assert {name for name, value in values.items() if not value.any()} == {
        name for name in values if re.search(zero, name)
    }
    for name, value in values.items():
        if value.ndim == 1 and value.any():
            assert "norm" in name
            assert torch.equal(value, torch.ones_like(value)), name
        elif value.any():
            assert value.std().item() * value[0].numel() ** 0.5 == pytest.approx(1, rel=0.2), name


def with_long_context() -> PackedModel:
    return build_model(replace(tiny_architecture("5b"), long_context="linear"), SDPA)


def test_layers_beside_published_ones_are_drawn_unless_the_weights_have_them(tmp_path: Path) -> None:
    stock_model("5b").save_pretrained(tmp_path)
    model = with_long_context()
    first, again, other = (whole(model, str(tmp_path), seed=seed) for seed in (0, 0, 1))
    known = packed_model("5b").state_dict()
    assert all(torch.equal(first[name], value) for name, value in known.items())
    added = first.keys() - known.keys()
    assert len(added) > 10
    assert all(".long_context." in name for name in added)
    assert all(torch.equal(first[name], again[name]) for name in added)
    assert any(not torch.equal(first[name], other[name]) for name in added)
    # Once a folder has them they are read, and all of them.
    file = tmp_path / f"{WEIGHTS}.safetensors"
    save_file(other, file)
    assert all(torch.equal(value, other[name]) for name, value in whole(model, str(tmp_path)).items())
    lost = min(added)
    save_file({name: value for name, value in other.items() if name != lost}, file)
    with pytest.raises(ConfigError, match=rf"{lost} is missing"):
        initial_values(str(tmp_path), model, seed=0)
    save_file(other, file)
    with pytest.raises(ConfigError, match="is unknown to this architecture"):
        initial_values(str(tmp_path), packed_model("5b"), seed=0)
