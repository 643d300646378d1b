"""The shipped training configs: each walks through all its stages on tiny models and clips.

Only sizes change: the model, budgets, steps, windows (a second stands for three), and meshes, which one rank
cannot make. The folder of each tiny model holds what `THUDM/CogVideoX-5b` or its image-to-video sister would.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

from schemas.card import read_card
from schemas.load import check_config
from schemas.train_config import TrainConfig
from tests.trainer.datasets import PROMPT_WIDTH, write_dataset
from trainer.checkpoint import find_checkpoint
from trainer.inputs import INPUTS_NAME, inputs_of
from trainer.loop import train
from trainer.metrics import read_records
from trainer.parallel import Member, join

CONFIGS = Path(__file__).parents[2] / "configs" / "train"
SHAPES = tuple((frames, 32, 32) for frames in (5, 9, 13, 17, 25, 41, 49, 57, 65, 81))
STAGE_STEPS = 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("configs") / "latents", shapes=SHAPES, image="first_latent")


def tiny_model(folder: Path, *, hub_id: str, dataset: Path) -> str:
    """A random stock model of the published one's kind, that knows the dataset's latents."""
    channels = 32 if hub_id.endswith("I2V") else 16
    model = CogVideoXTransformer3DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=16,
        time_embed_dim=16,
        text_embed_dim=PROMPT_WIDTH,
        max_text_seq_length=8,
        sample_height=4,
        sample_width=4,
        sample_frames=81,
        use_rotary_positional_embeddings=True,
    )
    model.save_pretrained(folder)
    (folder / INPUTS_NAME).write_text(json.dumps(inputs_of(read_card(dataset))))
    return str(folder)


def made_small(tree: dict[str, Any], *, dataset: Path, folder: Path) -> dict[str, Any]:
    tree |= {"dataset": str(dataset), "output": str(folder / "run")}
    tree.pop("mesh", None)
    model = tree["model"]
    model["compile"] = False
    if (hub_id := model.get("init", "random")) != "random":
        model["init"] = tiny_model(folder / "model", hub_id=hub_id, dataset=dataset)
    else:
        model |= {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 16}
    if model.get("local_frames"):
        model["local_frames"] = 2
    tree["precision"] = {"param": "float32"}
    tree["data"] |= {"budget_tokens": 200, "slots": 2}
    tree["validation"] = {"share": 0.3, "every": 2}
    for stage in tree["stages"]:
        stage.pop("mesh", None)
        stage.pop("budget_tokens", None)
        stage.pop("filter", None)
        stage |= {"steps": STAGE_STEPS, "slots": 2}
        stage["lr"] |= {"warmup": 1}
        if "max_s" in stage:
            stage["max_s"] /= 6
        if "lora" in stage:
            stage["lora"]["rank"] = 4
    return tree


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_config_trains_through_all_its_stages(path: Path, dataset: Path, tmp_path: Path) -> None:
    tree = tomllib.loads(path.read_text())
    shipped = check_config(tree, TrainConfig, where=str(path))
    small = made_small(tree, dataset=dataset, folder=tmp_path)
    if path.stem == "latentsync":  # 16 frames are for VAEs without compression in time
        for stage in small["stages"]:
            assert stage["max_frames"] == 16
            stage["max_frames"] = 5
    config = check_config(small, TrainConfig, where=str(path))
    with join(Member.alone(), config.mesh, deterministic=True) as world:
        train(config, world=world)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["stage"] for record in records] == [
        stage.name for stage in shipped.stages for _ in range(STAGE_STEPS)
    ]
    assert find_checkpoint(tmp_path / "run").step == len(records)
