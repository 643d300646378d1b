"""Export and folder init: what stock diffusers opens, and what it saved, value for value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from safetensors.torch import load_file, save_file

from schemas.errors import ConfigError
from schemas.train_config import ModelConfig, OptimConfig
from tests.trainer.gloo import on_two_ranks
from tests.trainer.stock import CONFIGS, packed_model, stock_model
from tests.trainer.test_parallel import Values, alone, sharded_model, whole
from trainer import checkpoint
from trainer.attention import sdpa
from trainer.checkpoint import find_checkpoint
from trainer.export import export
from trainer.model import PackedCogVideoX
from trainer.objective import Schedule
from trainer.optim import make_optimizer
from trainer.parallel import World, fill
from trainer.weights import WEIGHTS_NAME, DataShape, architecture, initial_values

INPUTS = {"latents": {"video_encoder.kind": "dct"}, "prompts": {}}
DATA = DataShape(latents=(3, 4, 12, 16), temporal=4, prompt=(7, 12))


def save_untrained(world: World, output: str) -> None:
    model = sharded_model(world)
    rest = dict.fromkeys(("stage", "stopped", "config", "fingerprint", "plan_digest"), "")
    schedule = vars(Schedule(snr_shift_scale=3.0))
    meta = {**rest, "inputs": INPUTS, "transformer": CONFIGS["5b"], "schedule": schedule}
    checkpoint.save(
        Path(output),
        step=0,
        model=model,
        optimizer=make_optimizer(model, OptimConfig()),
        meta=meta,
        world=world,
        keep=1,
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a checkpoint that two ranks wrote."""
    run = tmp_path_factory.mktemp("run")
    on_two_ranks(save_untrained, str(run))
    export(find_checkpoint(run), run / "exported")
    return run / "exported"


def test_stock_diffusers_opens_the_export_strictly_with_equal_values(exported: Path) -> None:
    model, report = CogVideoXTransformer3DModel.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values()), report
    expected = packed_model("5b").state_dict()
    found = model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert {name: model.config[name] for name in CONFIGS["5b"]} == CONFIGS["5b"]
    assert json.loads((exported / "config.json").read_text())["_class_name"] == "CogVideoXTransformer3DModel"
    assert json.loads((exported / "latents.json").read_text()) == INPUTS
    scheduler = CogVideoXDDIMScheduler.from_pretrained(exported / "scheduler")
    torch.testing.assert_close(
        scheduler.alphas_cumprod, Schedule(snr_shift_scale=3.0).alphas_cumprod(), rtol=1e-12, atol=1e-15
    )


def test_export_overwrites_nothing(exported: Path) -> None:
    with pytest.raises(ConfigError, match="is not empty"):
        export(find_checkpoint(exported.parent), exported)
    with pytest.raises(ConfigError, match="is a file"):
        export(find_checkpoint(exported.parent), exported / "config.json")


def read_folder(world: World, init: str) -> tuple[dict[str, object], Schedule, Values]:
    plan = architecture(ModelConfig(init=init), DATA)
    with torch.device("meta"):
        model = PackedCogVideoX.build(plan.config, attention=sdpa)
    read = initial_values(init, model, seed=0)
    model = sharded_model(world, seed=9)
    fill(model, read, device=world.device)
    return plan.config, plan.schedule, {name: whole(p) for name, p in model.named_parameters()}


def test_an_exported_folder_starts_a_run_with_its_weights_and_schedule(exported: Path) -> None:
    for config, schedule, values in (
        *on_two_ranks(read_folder, str(exported)),
        alone(read_folder, str(exported)),
    ):
        assert {name: config[name] for name in CONFIGS["5b"]} == CONFIGS["5b"]
        assert schedule == Schedule(snr_shift_scale=3.0)
        expected = packed_model("5b").state_dict()
        assert values.keys() == expected.keys()
        assert all(torch.equal(values[name], value) for name, value in expected.items())


def test_a_pipeline_folder_in_several_files_is_read(tmp_path: Path) -> None:
    stock = stock_model("2b")
    stock.save_pretrained(tmp_path / "transformer", max_shard_size="40KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    plan = architecture(ModelConfig(init=str(tmp_path)), DATA)
    assert plan.schedule.snr_shift_scale == 3.0  # no scheduler beside it: that of the 2B family
    read = initial_values(str(tmp_path), stock, seed=0)
    for name, value in stock.state_dict().items():
        assert torch.equal(read(name, (slice(1, 5),)), value[1:5])


def test_weights_that_are_not_what_the_config_says_are_refused(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    weights = load_file(folder / WEIGHTS_NAME)
    weights["lora.extra"] = torch.zeros(1)
    weights["proj_out.bias"] = torch.zeros(3)
    del weights["norm_final.weight"]
    save_file(weights, folder / WEIGHTS_NAME)
    with pytest.raises(ConfigError, match="3 differences") as caught:
        initial_values(str(folder), packed_model("5b"), seed=0)
    for part in (
        "lora.extra is unknown",
        "norm_final.weight is missing",
        "proj_out.bias: expected (16,), found (3,)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataShape((3, 16, 12, 16), 4, (7, 12)), "in_channels = 4, the dataset has 16"),
        (DataShape((3, 4, 12, 16), 4, (7, 64)), "text_embed_dim = 12, the dataset has 64"),
        (DataShape((3, 4, 12, 16), 4, (226, 12)), "longest prompt has 226 tokens"),
        (DataShape((3, 4, 12, 16), 8, (7, 12)), "temporal_compression_ratio = 4, the dataset has 8"),
    ],
)
def test_a_folder_that_does_not_fit_the_dataset_is_refused(
    exported: Path, data: DataShape, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        architecture(ModelConfig(init=str(exported)), data)


def test_a_config_of_another_kind_of_model_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"lora_rank": 4}))
    with pytest.raises(ConfigError, match="does not know: lora_rank"):
        architecture(ModelConfig(init=str(folder)), DATA)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "[]", "holds no JSON object"),
        ("config.json", '{"in_channels": "16"}', "in_channels = '16', expected one like 16"),
        (f"{WEIGHTS_NAME}.index.json", '{"weight_map": 3}', "no weight_map"),
        (WEIGHTS_NAME, "cut short", "cannot be read.*fetch it again"),
        ("scheduler/scheduler_config.json", "{", "cannot be read"),
        ("scheduler/scheduler_config.json", "{}", "beta_schedule = None, expected 'scaled_linear'"),
    ],
)
def test_a_damaged_folder_is_named(
    exported: Path, tmp_path: Path, name: str, text: str, message: str
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    (folder / name).write_text(text)

    def start() -> None:
        architecture(ModelConfig(init=str(folder)), DATA)
        initial_values(str(folder), packed_model("5b"), seed=0)

    with pytest.raises(ConfigError, match=message):
        start()


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found no config\.json"):
        architecture(ModelConfig(init=str(tmp_path)), DATA)
