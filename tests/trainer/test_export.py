"""Export: what stock diffusers opens and what this trainer reads again, value for value."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from safetensors.torch import load_file

from schemas.errors import ConfigError
from schemas.train_config import LoraConfig, ModelConfig, StageConfig, TrainConfig
from tests.trainer.gloo import on_two_ranks
from tests.trainer.stock import (
    CONFIGS,
    SDPA,
    clip_errors,
    clips,
    pack_inputs,
    packed_model,
    stock_loss,
    tiny_architecture,
)
from tests.trainer.test_dit import Variant, dit_architecture
from tests.trainer.test_lineage import known, save_stage
from tests.trainer.test_parallel import Values, alone
from trainer.architecture import Architecture, DataShape, architecture
from trainer.checkpoint import Saved, find_checkpoint
from trainer.dit import PackedDiT
from trainer.export import export, published_base
from trainer.lora import LORA_NAME, add_adapters
from trainer.model import build_model
from trainer.model_folder import WEIGHTS
from trainer.objective import Schedule
from trainer.weights import initial_values

INPUTS = {"latents": {"video_encoder.kind": "dct"}, "prompts": {}}
DATA = DataShape(latents=(3, 4, 12, 16), temporal=4, prompt=(7, 12))
LORA = LoraConfig(targets=("to_q", "to_k", "to_v", r"to_out\.0", "text_proj"), rank=3, alpha=1.5)


def run_config(*stages: dict[str, Any], init: str = "THUDM/CogVideoX-5b", **model: Any) -> dict[str, Any]:
    settings = [{"name": f"s{i}", "steps": 1, "lr": {"peak": 1.0}} | stage for i, stage in enumerate(stages)]
    config = TrainConfig(
        dataset="d",
        output="o",
        model=ModelConfig(init=init, **model),
        stages=tuple(StageConfig.model_validate(stage) for stage in settings),
    )
    return config.model_dump(mode="json")


def save(run: Path, lora: LoraConfig | None, plan: Architecture | None = None, **stage: Any) -> Saved:
    """A checkpoint in `run` of one stage, with adapters that have an effect."""
    first = {"name": "first", "lora": lora and lora.model_dump(mode="json"), **stage}
    more = {"inputs": INPUTS, "config": run_config(first)}
    alone(save_stage, str(run), lora, plan, None, None, more)
    return find_checkpoint(run)


def read_again(folder: Path, plan: Architecture) -> Values:
    """All that is in an export: weights as a run starts from them, and adapters, under their names there."""
    found: Values = {}
    if (folder / LORA_NAME).exists():
        found = {name.removeprefix("transformer."): v for name, v in load_file(folder / LORA_NAME).items()}
        (folder / LORA_NAME).unlink()  # beside adapters weights start no run
    if (folder / "config.json").exists():
        model = build_model(plan, SDPA)
        read = initial_values(str(folder), model, seed=0)
        for name, value in model.state_dict().items():
            found[name] = read(name, tuple(slice(0, size) for size in value.shape))
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a checkpoint that two ranks wrote."""
    run = tmp_path_factory.mktemp("run")
    plan = replace(tiny_architecture("5b"), schedule=Schedule(snr_shift_scale=3.0))
    more = {"inputs": INPUTS, "config": run_config({"name": "first"})}
    on_two_ranks(save_stage, str(run), None, plan, None, None, more)
    assert export(find_checkpoint(run), run / "exported") == []
    return run / "exported"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A checkpoint of a stage that trained adapters beside published weights."""
    return save(tmp_path_factory.mktemp("adapted"), LORA)


def test_stock_diffusers_opens_the_export_strictly_with_equal_values(exported: Path) -> None:
    model, report = CogVideoXTransformer3DModel.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values()), report
    expected = packed_model("5b").state_dict()
    found = model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert {name: model.config[name] for name in CONFIGS["5b"]} == CONFIGS["5b"]
    assert json.loads((exported / "config.json").read_text())["_class_name"] == "CogVideoXTransformer3DModel"
    attention = {"local_frames": 0, "leading_frames": 1, "long_context": "none"}
    assert json.loads((exported / "latents.json").read_text()) == INPUTS | {"attention": attention}
    scheduler = CogVideoXDDIMScheduler.from_pretrained(exported / "scheduler")
    torch.testing.assert_close(
        scheduler.alphas_cumprod, Schedule(snr_shift_scale=3.0).alphas_cumprod(), rtol=1e-12, atol=1e-15
    )


def test_an_exported_folder_starts_a_run_with_its_weights_and_schedule(exported: Path) -> None:
    plan = architecture(ModelConfig(init=str(exported)), DATA)
    assert {name: plan.config[name] for name in CONFIGS["5b"]} == CONFIGS["5b"]
    assert plan.schedule.snr_shift_scale == 3.0
    read = initial_values(str(exported), packed_model("5b"), seed=0)
    for name, value in packed_model("5b").state_dict().items():
        assert torch.equal(read(name, (slice(1, 5),)), value[1:5])


def test_export_overwrites_nothing(exported: Path) -> None:
    with pytest.raises(ConfigError, match="is not empty"):
        export(find_checkpoint(exported.parent), exported)
    with pytest.raises(ConfigError, match="is a file"):
        export(find_checkpoint(exported.parent), exported / "config.json")


def assert_same_losses(stock: CogVideoXTransformer3DModel) -> None:
    """Stock diffusers, one clip at a time, has the losses of the packed model with the saved adapters."""
    model = build_model(tiny_architecture("5b"), SDPA)
    add_adapters(model, LORA)
    values = {
        name: known(name, tuple(slice(0, size) for size in value.shape), value.shape)
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(values)
    inputs, target = pack_inputs(clips(), variant="5b")
    with torch.no_grad():
        found = clip_errors(model(inputs), target, lengths=inputs.video_lengths)
        expected = torch.stack([stock_loss(stock, clip) for clip in clips()]).to(found.dtype)
        plain = clip_errors(packed_model("5b")(inputs), target, lengths=inputs.video_lengths)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert not torch.allclose(found, plain, rtol=1e-2)


def test_merged_adapters_are_part_of_what_stock_diffusers_opens(adapted: Saved, tmp_path: Path) -> None:
    assert export(adapted, tmp_path / "out", merge=True) == []
    assert not (tmp_path / "out" / LORA_NAME).exists()
    model, report = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_losses(model)


def test_adapters_are_exported_under_the_names_of_diffusers(adapted: Saved, tmp_path: Path) -> None:
    notes = export(adapted, tmp_path / "out")
    assert notes == [f"{LORA_NAME}: adapters of rank 3, beside THUDM/CogVideoX-5b"]
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert files == {LORA_NAME, "latents.json", "scheduler/scheduler_config.json"}
    # Without a word on alpha diffusers and peft add `B A`: https://huggingface.co/docs/diffusers/api/loaders/lora
    values = load_file(tmp_path / "out" / LORA_NAME)
    model = CogVideoXTransformer3DModel.from_config(CONFIGS["5b"])
    model.load_state_dict(packed_model("5b").state_dict())
    layers = {name.rsplit(".", 2)[0] for name in values}
    assert len(layers) == 2 * 4 + 1
    assert set(values) == {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    with torch.no_grad():
        for layer in layers:
            a, b = (values[f"{layer}.lora_{part}.weight"] for part in "AB")
            model.get_parameter(f"{layer.removeprefix('transformer.')}.weight").add_(b @ a)
    assert_same_losses(model)


def test_the_stock_pipeline_loads_the_adapters(adapted: Saved, tmp_path: Path) -> None:
    export(adapted, tmp_path / "out")
    model = CogVideoXTransformer3DModel.from_config(CONFIGS["5b"])
    model.load_state_dict(packed_model("5b").state_dict())
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": CogVideoXDDIMScheduler()}
    CogVideoXPipeline(transformer=model, **parts).load_lora_weights(tmp_path / "out")
    assert_same_losses(model)


def test_adapters_beside_weights_that_were_trained_come_with_them(tmp_path: Path) -> None:
    saved = save(tmp_path / "run", LORA, trainable=["@norms"])
    (note,) = export(saved, tmp_path / "out")
    assert note.endswith(
        "beside the weights in this folder, which are nowhere else: random, trained, or merged into"
    )
    model = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out")
    assert all(
        torch.equal(model.state_dict()[name], value)
        for name, value in packed_model("5b").state_dict().items()
    )
    assert len(load_file(tmp_path / "out" / LORA_NAME)) == 18


ADAPTERS = {"lora": {"rank": 4}}


@pytest.mark.parametrize(
    ("config", "stage", "expected"),
    [
        (run_config(ADAPTERS), "s0", "THUDM/CogVideoX-5b"),
        (run_config(ADAPTERS, ADAPTERS), "s1", "THUDM/CogVideoX-5b"),
        (run_config(ADAPTERS, {}), "s0", "THUDM/CogVideoX-5b"),  # the second has not been
        (run_config({}, ADAPTERS), "s1", None),
        (run_config({}, ADAPTERS | {"init": "other"}), "s1", "other"),
        (run_config({"lora": {"rank": 8}}, ADAPTERS), "s1", None),  # merged
        (run_config(ADAPTERS | {"trainable": ["@norms"]}), "s0", None),
        (run_config(ADAPTERS, init="random"), "s0", None),
        (run_config(ADAPTERS, revision="v1"), "s0", "THUDM/CogVideoX-5b at revision v1"),
        (run_config({}, ADAPTERS | {"init": "other"}, revision="v1"), "s1", "other"),
        (run_config(ADAPTERS, long_context="linear"), "s0", None),
    ],
)
def test_adapters_stand_beside_published_weights_where_nothing_else_was_trained(
    config: dict[str, Any], stage: str, expected: str | None
) -> None:
    lora = next(each["lora"] for each in config["stages"] if each["name"] == stage)
    assert published_base({"config": config, "stage": stage, "lora": lora}) == expected


@pytest.mark.parametrize("variant", [Variant(), Variant(text="cross", image=True, long_context="linear")])
def test_a_dit_is_read_again_as_it_was(variant: Variant, tmp_path: Path) -> None:
    plan = dit_architecture(variant)
    saved = save(tmp_path / "run", None, plan)
    export(saved, tmp_path / "out")
    again = architecture(
        ModelConfig(kind="dit", init=str(tmp_path / "out"), long_context=variant.long_context), DATA
    )
    assert again == replace(plan, schedule=again.schedule)
    values = read_again(tmp_path / "out", again)
    for name, value in values.items():
        assert torch.equal(value, known(name, tuple(slice(0, size) for size in value.shape), value.shape))
    if variant.long_context == "none":
        plain, report = PackedDiT.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(report.values()), report
        assert all(torch.equal(value, values[name]) for name, value in plain.state_dict().items())


def test_adapters_of_a_dit_are_exported_merged(tmp_path: Path) -> None:
    saved = save(tmp_path / "run", LoraConfig(rank=2), dit_architecture(Variant()))
    with pytest.raises(ConfigError, match="export with --merge"):
        export(saved, tmp_path / "out")
    export(saved, tmp_path / "out", merge=True)
    assert not any(".lora_" in name for name in load_file(tmp_path / "out" / f"{WEIGHTS}.safetensors"))


def test_long_context_layers_are_exported_and_said_to_be_ours(tmp_path: Path) -> None:
    plan = replace(tiny_architecture("5b"), long_context="linear")
    saved = save(tmp_path / "run", None, plan)
    assert export(saved, tmp_path / "out") == [
        "the long-context layers are in the file, but only this trainer knows them"
    ]
    for name, value in read_again(tmp_path / "out", plan).items():
        assert torch.equal(value, known(name, tuple(slice(0, size) for size in value.shape), value.shape))
    assert (
        json.loads((tmp_path / "out/config.json").read_text())["_class_name"] == "CogVideoXTransformer3DModel"
    )


def test_local_attention_is_said_and_starts_no_run_without(tmp_path: Path) -> None:
    plan = tiny_architecture("5b", local_frames=2)
    (note,) = export(save(tmp_path / "run", None, plan), tmp_path / "out")
    assert note.startswith(
        "trained on spans of 2 latent frames, each with a copy of the prompt; stock diffusers"
    )
    init = str(tmp_path / "out")
    assert architecture(ModelConfig(init=init, local_frames=2), DATA).config == plan.config
    with pytest.raises(ConfigError, match=r"local_frames is 0, latents\.json has 2"):
        architecture(ModelConfig(init=init), DATA)


def test_a_checkpoint_that_describes_another_model_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path / "run", None)
    plan = tiny_architecture("5b")
    wide = replace(plan, config=plan.config | {"text_embed_dim": 24})
    for changed, message in (
        (wide, r"text_proj\.weight: expected \(32, 24\), found \(32, 12\)"),
        (replace(plan, config=plan.config | {"num_layers": 1}), r"transformer_blocks\.1\..* is unknown"),
    ):
        meta = saved.meta | {"architecture": changed.record()}
        with pytest.raises(ConfigError, match=message):
            export(replace(saved, meta=meta), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trained", ["adapters", "all", "adapters and norms"])
def test_a_step_at_learning_rate_zero_changes_no_value_up_to_the_next_run(
    trained: str, tmp_path: Path
) -> None:
    """Step, save, load, export, read again: the same bits all the way."""
    lora = None if trained == "all" else LoraConfig(rank=4)
    settings: dict[str, Any] = {"name": "first", "lora": lora and lora.model_dump(mode="json")}
    if trained == "adapters and norms":
        settings["trainable"] = ["@norms"]
    more = {"inputs": INPUTS, "config": run_config(settings)}
    before = alone(save_stage, str(tmp_path / "before"), lora)
    stepped = alone(save_stage, str(tmp_path / "run"), lora, None, None, 0.0, more)
    saved = find_checkpoint(tmp_path / "run")
    export(saved, tmp_path / "out")
    found = read_again(tmp_path / "out", tiny_architecture("5b"))
    kept = {name for name in before if ".lora_" in name} if trained == "adapters" else before.keys()
    assert found.keys() == kept
    for name, value in found.items():
        assert torch.equal(stepped[name], before[name])
        assert torch.equal(value, before[name])
