"""What is found out about stages to come before the first step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from schemas.errors import ConfigError
from schemas.train_config import LossConfig, TrainConfig
from tests.trainer.datasets import write_dataset
from tests.trainer.stock import SDPA, stock_model, tiny_architecture
from tests.trainer.test_loop import config as loop_config
from tests.trainer.test_loop import run
from tests.trainer.test_parallel import alone
from trainer import check
from trainer.architecture import DataShape
from trainer.lora import LORA_NAME
from trainer.model import build_model
from trainer.model_folder import WEIGHTS
from trainer.objective import Schedule, make_objective
from trainer.stage_check import check_stages, run_architecture

DATA = DataShape(latents=(3, 4, 16, 24), temporal=4, prompt=(7, 12))
PLAN = tiny_architecture("5b")


def config(*stages: dict[str, Any], **settings: Any) -> TrainConfig:
    """Two steps of each stage."""
    tree = [{"name": f"s{i}", "steps": 2, "lr": {"peak": 1.0}} | stage for i, stage in enumerate(stages)]
    return TrainConfig.model_validate({"dataset": "set", "output": "run", "stages": tree} | settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stock_model("5b").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"trainable": ["@norms", "atn1"]}, r"stages\.1\.trainable\.1 = 'atn1' matches no parameter"),
        ({"lora": {"targets": ["to_kv"]}}, r"stages\.1\.lora\.targets\.0 = 'to_kv' is the end of no name"),
        (
            {"trainable": ["@norms"], "lr": {"peak": 1.0, "groups": [{"match": "@projector", "peak": 1.0}]}},
            r"stages\.1\.lr\.groups\.0\.match = '@projector' matches no trained parameter",
        ),
        ({"mesh": {"sp": 4}}, r"stages\.1\.mesh\.sp = 4 times mesh\.tp = 1 must divide the model's 2 heads"),
        (
            {"mesh": {"sp": 2, "tp": 2}},
            r"stages\.1\.mesh\.sp = 2 times mesh\.tp = 2 must divide the model's 2",
        ),
        ({"init": "/no/where"}, r"stages\.1\.init = '/no/where'"),
    ],
)
def test_a_later_stage_that_does_not_fit_is_named(stage: dict[str, Any], message: str) -> None:
    settings = config({}, stage, {})
    for step in (0, 2):
        with pytest.raises(ConfigError, match=f"^{message}"):
            check_stages(settings, PLAN, DATA, step=step)
    check_stages(settings, PLAN, DATA, step=4)  # it is over


def test_the_mesh_of_all_stages_is_looked_at_under_its_own_name() -> None:
    with pytest.raises(ConfigError, match=r"^mesh\.sp = 3"):
        check_stages(config({"mesh": {"sp": 2}}, {}, mesh={"sp": 3}), PLAN, DATA, step=0)
    plan = replace(PLAN, long_context="linear")
    check_stages(config({"lora": {"rank": 2}}, {}, mesh={"tp": 2}), plan, DATA, step=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, "num_layers: expected 2, found 3"),
        # Of the same weights these make another function.
        ({"sample_width": 48}, "sample_width: expected 24, found 48"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos: expected True, found False"),
        ({"text_embed_dim": 24}, "text_embed_dim = 24, the dataset has 12"),
    ],
)
def test_a_stage_starts_from_weights_of_the_runs_model(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    stock_model("5b", **changes).save_pretrained(tmp_path)
    settings = config({}, {"init": str(tmp_path)})
    with pytest.raises(ConfigError, match=rf"^stages\.1\.init.*{message}"):
        check_stages(settings, PLAN, DATA, step=2)
    check_stages(settings, PLAN, DATA, step=3)  # it has begun


def test_the_scheduler_beside_a_stages_own_weights_must_be_the_runs(folder: Path) -> None:
    settings = config({}, {"init": str(folder)})
    check_stages(settings, PLAN, DATA, step=0)  # the folder says nothing of its scheduler
    path = folder / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(Schedule().scheduler_config()))
    check_stages(settings, PLAN, DATA, step=0)
    path.write_text(json.dumps(make_objective(LossConfig(objective="flow"), Schedule()).scheduler_config()))
    with pytest.raises(ConfigError, match=r"the scheduler of stages\.1\.init says 'flow'"):
        check_stages(settings, PLAN, DATA, step=0)
    path.write_text(json.dumps(Schedule(snr_shift_scale=3.0).scheduler_config()))
    with pytest.raises(ConfigError, match=r"snr_shift_scale: expected 1\.0, found 3\.0"):
        check_stages(settings, PLAN, DATA, step=0)


def test_the_names_of_a_stages_own_weights_are_looked_at(folder: Path) -> None:
    file = folder / f"{WEIGHTS}.safetensors"
    weights = load_file(file)
    lost = weights.pop("proj_out.bias")
    save_file(weights, file)
    settings = config({}, {"init": str(folder), "lora": {"rank": 2}})
    with pytest.raises(ConfigError, match=r"^stages\.1\.init.*1 differences\): proj_out\.bias is missing"):
        check_stages(settings, PLAN, DATA, step=0)
    save_file(weights | {"proj_out.bias": lost}, file)
    check_stages(settings, PLAN, DATA, step=0)
    (folder / LORA_NAME).touch()
    with pytest.raises(ConfigError, match=r"^stages\.1\.init: .*--merge"):
        check_stages(settings, PLAN, DATA, step=0)


def test_where_the_first_stage_brings_weights_those_of_the_model_are_not_asked_for(folder: Path) -> None:
    settings = config({"init": str(folder)}, {}, model={"init": "/no/where", "revision": "v1"})
    plan = run_architecture(settings, DATA)
    assert plan == PLAN
    check_stages(settings, plan, DATA, step=0)
    stock_model("5b", num_layers=3).save_pretrained(folder)
    settings = config({"init": str(folder)}, {"init": "random"}, {"init": str(folder)})
    plan = run_architecture(settings, DATA)
    assert plan.config["num_layers"] == 3
    check_stages(settings, plan, DATA, step=0)


LORA: dict[str, Any] = {"lora": {"rank": 2}}


@pytest.mark.parametrize(
    ("stages", "refused"),
    [
        ([LORA], True),
        ([LORA, {"trainable": ["@norms"]}], True),
        ([LORA, LORA | {"trainable": ["@long_context"]}], False),
        ([LORA, {}], False),
        ([LORA | {"lr": {"peak": 0.0}}], False),  # nothing is to be trained
    ],
)
def test_new_long_context_layers_must_be_trained(stages: list[dict[str, Any]], refused: bool) -> None:
    plan = replace(PLAN, long_context="linear")
    if refused:
        with pytest.raises(ConfigError, match=r'its layers are new.*add "@long_context" to stages'):
            check_stages(config(*stages), plan, DATA, step=0)
        check_stages(config(*stages), plan, DATA, step=1)  # a run that goes on has been through this
    else:
        check_stages(config(*stages), plan, DATA, step=0)


def test_long_context_layers_that_are_given_need_no_training(folder: Path) -> None:
    settings = config(LORA, model={"init": str(folder), "long_context": "linear"})
    plan = replace(PLAN, long_context="linear")
    with pytest.raises(ConfigError, match="its layers are new"):
        check_stages(settings, plan, DATA, step=0)
    file = folder / f"{WEIGHTS}.safetensors"
    added = build_model(plan, SDPA).state_dict()
    save_file(added | load_file(file), file)
    check_stages(settings, plan, DATA, step=0)


@pytest.mark.parametrize("through", ["train", "check"])
def test_a_run_and_its_check_look_at_all_stages_first(through: str, tmp_path: Path) -> None:
    stages: list[dict[str, Any]] = [{"name": name, "steps": 1, "lr": {"peak": 1e-3}} for name in ("a", "b")]
    stages[1]["trainable"] = ["nothing like it"]
    settings = loop_config(write_dataset(tmp_path / "set"), tmp_path / "run", stages=stages)
    with pytest.raises(ConfigError, match=r"^stages\.1\.trainable\.0"):
        alone(run if through == "train" else looked_at, settings)
    assert not (tmp_path / "run" / "checkpoints").exists()


def looked_at(world: Any, settings: TrainConfig) -> None:
    check.check(settings, world=world)
