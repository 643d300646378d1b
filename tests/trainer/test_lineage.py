"""From stage to stage: weights pass strictly; adapters go on, are merged, or new; on any number of ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from schemas.errors import ConfigError
from schemas.train_config import LoraConfig, LrConfig, OptimConfig, PrecisionConfig, StageConfig
from tests.trainer.gloo import on_two_ranks
from tests.trainer.stock import SDPA, packed_model, tiny_architecture
from tests.trainer.test_parallel import Values, alone, whole
from trainer.architecture import Architecture
from trainer.checkpoint import KEYS, find_checkpoint
from trainer.lineage import load_weights
from trainer.lora import add_adapters, merged_delta
from trainer.model import PackedModel, build_model
from trainer.optim import make_optimizer, set_lr, set_trainable
from trainer.parallel import World
from trainer.saver import Saver
from trainer.sharding import Slices, fill, parallelize
from trainer.weights import initial_values

SMALL = LoraConfig(rank=2, alpha=3.0)
WIDE = LoraConfig(targets=("to_q", r"net\.2"), rank=3)
Change = Callable[[nn.Module], None]


@functools.cache
def published() -> Values:
    return packed_model("5b").state_dict()


def known(name: str, slices: Slices, shape: torch.Size) -> torch.Tensor:
    """The weights of `packed_model`, and for anything beside them numbers of their own."""
    value = published().get(name)
    if value is None or value.shape != shape:
        value = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
    return value[slices]


def sharded(
    world: World, architecture: Architecture, lora: LoraConfig | None, change: Change | None = None
) -> PackedModel:
    with torch.device("meta"):
        model = build_model(architecture, SDPA)
        if lora:
            add_adapters(model, lora)
    if change:
        change(model)
    settings: dict[str, Any] = {"name": "first", "steps": 1, "lr": {"peak": 0.1}, "lora": lora}
    set_trainable(model, StageConfig(**settings))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    parallelize(model, world=world, precision=PrecisionConfig())
    fill(model, lambda name, slices: known(name, slices, shapes[name]), device=world.device)
    return model


def save_stage(
    world: World,
    output: str,
    lora: LoraConfig | None,
    architecture: Architecture | None = None,
    change: Change | None = None,
    lr: float | None = None,
    more: dict[str, Any] | None = None,
) -> Values:
    """A checkpoint of stage `first`; with `lr` after a step of gradients. Returns its weights."""
    architecture = architecture or tiny_architecture("5b")
    model = sharded(world, architecture, lora, change)
    optimizer = make_optimizer(model, OptimConfig(), LrConfig(peak=1.0))
    if lr is not None:
        set_lr(optimizer, LrConfig(peak=lr, kind="constant"), step_in_stage=0, steps=1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    meta = {
        **{key: "" for key in KEYS if key not in ("step", "files")},
        "stage": "first",
        "objective": {},
        "architecture": architecture.record(),
        "lora": lora.model_dump(mode="json") if lora else None,
        **(more or {}),
    }
    with Saver(Path(output), world=world, keep=1, background=False) as saver:
        saver.save(1, model=model, optimizer=optimizer, meta=meta)
        saver.wait()
    return whole_state(model)


def whole_state(model: nn.Module) -> Values:
    return {name: whole(value).clone() for name, value in model.state_dict().items()}


def load_stage(
    world: World, output: str, lora: LoraConfig | None, architecture: Architecture | None = None
) -> tuple[Values, list[str]]:
    """The weights of the stage after `first`, whose own were something else before."""
    model = sharded(world, architecture or tiny_architecture("5b"), lora)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    lines = load_weights(find_checkpoint(Path(output)), model, seed=4)
    return whole_state(model), lines


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Values]:
    """A checkpoint with adapters that two ranks wrote, and what is in it."""
    run = str(tmp_path_factory.mktemp("run"))
    return run, on_two_ranks(save_stage, run, SMALL)[0]


def on_one_and_two_ranks(function: Any, *args: Any) -> Any:
    """The result, which is the same, bit for bit, on one rank and on two."""
    values, lines = alone(function, *args)
    for other, other_lines in on_two_ranks(function, *args):
        assert lines == other_lines
        assert values.keys() == other.keys()
        assert all(torch.equal(values[name], other[name]) for name in values)
    return values, lines


def test_the_same_adapters_go_on(saved: tuple[str, Values]) -> None:
    run, before = saved
    values, lines = on_one_and_two_ranks(load_stage, run, SMALL)
    assert lines == []
    assert values.keys() == before.keys()
    assert all(torch.equal(values[name], before[name]) for name in before)


@pytest.mark.parametrize("lora", [None, WIDE, SMALL.model_copy(update={"alpha": 6.0})])
def test_other_adapters_are_merged_and_new_ones_start_without_effect(
    saved: tuple[str, Values], lora: LoraConfig | None
) -> None:
    run, before = saved
    values, lines = on_one_and_two_ranks(load_stage, run, lora)
    assert lines[0] == "adapters of stage first merged into 8 layers"
    base = published()
    merged = 0
    for name, weight in base.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in before and name.endswith(".weight"):
            a, b = (before[f"{layer}.lora_{part}.weight"].double() for part in "AB")
            assert torch.equal(values[name], weight + (1.5 * (b @ a)).float())
            merged += 1
        else:
            assert torch.equal(values[name], weight)
    assert merged == 8
    drawn = values.keys() - base.keys()
    assert len(drawn) == (0 if lora is None else 16 if lora.rank == 2 else 8)
    assert lines[1:] == ([] if lora is None else [f"new adapters beside {len(drawn) // 2} layers"])
    for name in drawn:
        assert bool(values[name].any()) == (".lora_A." in name)
        assert not torch.equal(values[name], torch.full_like(values[name], 7))


def test_the_first_adapters_are_drawn_from_the_seed(tmp_path: Path) -> None:
    alone(save_stage, str(tmp_path), None)
    values, lines = on_one_and_two_ranks(load_stage, str(tmp_path), WIDE)
    assert lines == ["new adapters beside 4 layers"]
    with torch.device("meta"):
        model = build_model(tiny_architecture("5b"), SDPA)
        add_adapters(model, WIDE)
    read = initial_values("random", model, seed=4)
    for name, value in values.items():
        drawn = read(name, tuple(slice(0, size) for size in value.shape))
        assert torch.equal(value, drawn if ".lora_" in name else published()[name])


def rename_adapters(model: nn.Module) -> None:
    """As a checkpoint of another program might call them."""
    layer = model.get_submodule("transformer_blocks.1.attn1.to_q")
    layer.add_module("lora_down", layer.get_submodule("lora_A"))
    del layer.lora_A


@pytest.mark.parametrize(
    ("change", "architecture", "message"),
    [
        (rename_adapters, None, r"1\.attn1\.to_q\.lora_down\.weight is unknown to this model"),
        (
            None,
            replace(tiny_architecture("5b"), long_context="linear"),
            r"16 differences\).*long_context\.gate is unknown",
        ),
        (
            None,
            tiny_architecture("1.5"),
            r"patch_embed\.proj\.weight: expected \(32, 4, 2, 2\), found \(32, 32\)",
        ),
    ],
)
def test_weights_that_are_not_the_models_are_refused(
    change: Change | None, architecture: Architecture | None, message: str, tmp_path: Path
) -> None:
    """Renamed adapters too: left out in silence they would keep their first values."""
    alone(save_stage, str(tmp_path), SMALL, architecture, change)
    with pytest.raises(ConfigError, match=message):
        alone(load_stage, str(tmp_path), SMALL)


def test_a_step_at_learning_rate_zero_changes_no_value(tmp_path: Path) -> None:
    before, after, moved = (
        alone(save_stage, str(tmp_path / str(lr)), SMALL, None, None, lr) for lr in (None, 0.0, 0.1)
    )
    assert all(torch.equal(after[name], before[name]) for name in before)
    changed = {name for name in before if not torch.equal(moved[name], before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    loaded, _ = alone(load_stage, str(tmp_path / "0.0"), SMALL)
    assert all(torch.equal(loaded[name], before[name]) for name in before)


def test_a_merged_matrix_does_not_depend_on_how_it_is_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(128, 96, generator=generator), torch.randn(64, 128, generator=generator)
    whole = merged_delta({"x.lora_A.weight": a, "x.lora_B.weight": b}, "x", scale=0.5)
    cut = merged_delta({"x.lora_A.weight": a, "x.lora_B.weight": b[16:32]}, "x", scale=0.5)
    assert torch.equal(whole[16:32], cut)
