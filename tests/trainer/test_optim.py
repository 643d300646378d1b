"""What a stage trains, at which rates, and what AdamW does with it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from schemas.errors import ConfigError
from schemas.train_config import LoraConfig, LrConfig, OptimConfig, StageConfig
from tests.trainer.stock import packed_model
from tests.trainer.test_dit import Variant, dit_model
from trainer.lora import add_adapters
from trainer.optim import GROUPS, make_optimizer, set_lr, set_trainable


def stage(*trainable: str, **settings: Any) -> StageConfig:
    lr = {"peak": 0.1, "kind": "constant"} | settings.pop("lr", {})
    return StageConfig.model_validate(
        {"name": "s", "steps": 10, "trainable": trainable, "lr": lr, **settings}
    )


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def full_dit() -> nn.Module:
    """A model that has every part a group is named for."""
    model = dit_model(Variant(text="cross", long_context="linear"))
    add_adapters(model, LoraConfig(rank=2))
    return model


def test_the_trainable_rule_trains_exactly_what_it_names() -> None:
    model = packed_model("5b")
    table = set_trainable(model, stage(r"attn1\.to_[qk]\.", r"^norm_final"))
    assert trained(model) == {
        *(
            f"transformer_blocks.{i}.attn1.to_{x}.{kind}"
            for i in (0, 1)
            for x in "qk"
            for kind in ("weight", "bias")
        ),
        "norm_final.weight",
        "norm_final.bias",
    }
    assert [row.split()[1] for row in table] == ["8", "2", "10", "64"]
    all_alike = [set_trainable(model, stage(group)) for group in ("@norms", "@feed_forward")]
    assert len({len(row) for rows in (table, *all_alike) for row in rows}) == 1
    with pytest.raises(ConfigError, match=r"trainable.1 = 'atn1.to_q' matches no parameter.*attn1\.to_q"):
        set_trainable(model, stage(".*", "atn1.to_q"))
    set_trainable(model, stage())
    assert len(trained(model)) == 64


@pytest.mark.parametrize(
    ("group", "per_block", "others"),
    [
        (
            "@attention",
            [f"attn1.{part}" for part in ("norm_k", "norm_q", "to_k", "to_out.0", "to_q", "to_v")],
            [],
        ),
        ("@feed_forward", ["ff.net.0.proj", "ff.net.2"], []),
        (
            "@norms",
            ["attn1.norm_k", "attn1.norm_q", "norm1.norm", "norm2.norm"],
            ["norm_final", "norm_out.norm"],
        ),
        (
            "@modulation",
            ["norm1.linear", "norm2.linear"],
            ["norm_out.linear", "time_embedding.linear_1", "time_embedding.linear_2"],
        ),
        ("@projector", [], ["patch_embed.text_proj"]),
        ("@patches", [], ["patch_embed.proj", "proj_out"]),
    ],
)
def test_groups_name_the_parts_of_cogvideox(group: str, per_block: list[str], others: list[str]) -> None:
    model = packed_model("5b")
    set_trainable(model, stage(group))
    layers = {re.sub(r"\.(weight|bias)$", "", name) for name in trained(model)}
    assert layers == {*others, *(f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in per_block)}


def test_groups_name_the_parts_of_the_dit_and_nothing_is_left_over() -> None:
    model = full_dit()
    names: dict[str, set[str]] = {}
    for group in GROUPS:
        set_trainable(model, stage(group))
        names[group] = trained(model)
    assert {name.split(".")[2] for name in names["@cross_attention"]} == {"cross", "norm_cross"}
    assert {name.split(".")[2] for name in names["@long_context"]} == {"long_context"}
    assert {name.split(".")[0] for name in names["@projector"]} == {"text_projector"}
    assert len(names["@lora"]) == 2 * 2 * (4 + 4)
    assert not any(".long_context." in name for name in names["@norms"])
    # A norm may belong to the layer it serves too; no other name has two groups.
    alone = [found for group, found in names.items() if group not in ("@norms", "@lora")]
    assert sum(map(len, alone)) == len(set().union(*alone))
    assert set().union(*names.values()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("@attentions", r"trainable.0 = '@attentions' is no named group; the closest is @attention, all are"),
        (
            "@cross_attention",
            r"matches no parameter of the model; groups that do are @attention, @feed_forward",
        ),
    ],
)
def test_a_group_that_finds_nothing_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_trainable(packed_model("5b"), stage(pattern))


@pytest.mark.parametrize(
    "settings",
    [
        {"trainable": ["("]},
        {"lora": {"targets": ["to_q", "("]}},
        {"lr": {"groups": [{"match": "(", "peak": 1.0}]}},
    ],
)
def test_what_is_no_regex_is_refused_with_the_config(settings: dict[str, Any]) -> None:
    tree = {"name": "s", "steps": 1, "lr": {"peak": 0.1} | settings.pop("lr", {}), **settings}
    with pytest.raises(ValidationError, match=r"'\(' is not a regular expression: missing \), unterminated"):
        StageConfig.model_validate(tree)


def test_with_adapters_they_are_trained_and_what_is_named_besides() -> None:
    model = full_dit()
    set_trainable(model, stage(lora={"rank": 2}))
    adapters = trained(model)
    assert len(adapters) == 32
    assert all(".lora_" in name for name in adapters)
    set_trainable(model, stage("@projector", lora={"rank": 2}))
    assert {name for name in trained(model) - adapters if not name.startswith("text_projector.")} == set()
    assert len(trained(model)) == 32 + 4


def stepped(model: nn.Module, settings: StageConfig, *, step: int) -> dict[str, float]:
    """Weight -> what a step without gradients left of it."""
    set_trainable(model, settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.5), settings.lr)
    rate = set_lr(optimizer, settings.lr, step_in_stage=step, steps=settings.steps)
    assert rate == pytest.approx(0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    left = {}
    for name, parameter in model.named_parameters():
        share = parameter.detach().norm() / before[name].norm()
        torch.testing.assert_close(parameter.detach(), before[name] * share)
        left[name] = share.item()
    return left


def test_adamw_decays_matrices_only_and_leaves_frozen_parameters_alone() -> None:
    for name, left in stepped(packed_model("5b"), stage("norm_final", "proj_out"), step=0).items():
        assert left == pytest.approx(0.95 if name == "proj_out.weight" else 1, abs=1e-6), name


def test_a_group_of_parameters_has_a_rate_of_its_own_and_the_first_that_fits_counts() -> None:
    lr = {
        "groups": [
            {"match": r"blocks\.0\.ff\.", "peak": 0.8, "kind": "constant"},
            {"match": "@feed_forward", "peak": 0.6, "kind": "cosine", "end": 0.2},
        ]
    }
    left = stepped(packed_model("5b"), stage(lr=lr), step=5)
    assert left["transformer_blocks.0.ff.net.2.weight"] == pytest.approx(1 - 0.5 * 0.8)
    assert left["transformer_blocks.1.ff.net.2.weight"] == pytest.approx(1 - 0.5 * 0.4)  # half way down
    assert left["transformer_blocks.1.attn1.to_q.weight"] == pytest.approx(1 - 0.5 * 0.1)


def test_a_rate_for_what_is_not_trained_is_refused() -> None:
    model = packed_model("5b")
    set_trainable(model, stage("@attention"))
    lr = LrConfig.model_validate({"peak": 0.1, "groups": [{"match": "@feed_forward", "peak": 1.0}]})
    with pytest.raises(
        ConfigError, match=r"lr\.groups\.0\.match = '@feed_forward' matches no trained parameter"
    ):
        make_optimizer(model, OptimConfig(), lr)
