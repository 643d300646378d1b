"""What a model is before it has weights: made for a dataset or found, recorded, held against the dataset."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from schemas.errors import ConfigError
from schemas.scaling import Scaling
from schemas.train_config import ModelConfig, TrainConfig
from tests.trainer.datasets import write_dataset
from tests.trainer.stock import SDPA, packed_model, stock_model, tiny_architecture
from trainer.architecture import Architecture, DataShape, architecture, data_shape
from trainer.catalog import Catalog
from trainer.checkpoint import META_NAME
from trainer.collate import collate
from trainer.inputs import INPUTS_NAME
from trainer.layout import check_clips
from trainer.loader import Loader
from trainer.lora import LORA_NAME
from trainer.model import build_model
from trainer.model_folder import WEIGHTS
from trainer.objective import Schedule
from trainer.weights import initial_values

DATA = DataShape(latents=(3, 4, 16, 24), temporal=4, prompt=(7, 12))


def settings(**changes: Any) -> ModelConfig:
    tree = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 24}
    return ModelConfig.model_validate(tree | changes)


@pytest.mark.parametrize("kind", ["cogvideox", "dit"])
@pytest.mark.parametrize("patch_t", [1, 2])
@pytest.mark.parametrize("image", [False, True])
def test_a_model_is_made_for_the_dataset(kind: str, patch_t: int, image: bool) -> None:
    found = architecture(settings(kind=kind, patch_size_t=patch_t, image_condition=image), DATA)
    layout = found.layout
    assert (layout.patch_t, layout.image, layout.out_channels) == (patch_t, image, 4)
    assert layout.in_channels == 4 * (1 + image)
    latents = torch.ones(2, 4, 16, 24)
    inputs = collate(
        [latents], [torch.ones(7, 12)], [500], layout=layout, images=[latents[:1]] if image else None
    )
    assert build_model(found, SDPA)(inputs).shape == (2 // patch_t * 8 * 12, 4 * 4 * patch_t)


@pytest.mark.parametrize(
    "changes", [{}, {"kind": "dit", "text": "cross"}, {"local_frames": 2, "patch_size_t": 2}]
)
def test_a_record_says_all_of_it(changes: dict[str, Any]) -> None:
    made = architecture(settings(**changes, long_context="linear"), DATA)
    found = Architecture.from_record(json.loads(json.dumps(made.record())))
    assert found == made
    assert found.layout == made.layout


def test_of_pieces_encoded_apart_no_frame_leads(tmp_path: Path) -> None:
    catalog = Catalog(write_dataset(tmp_path / "set"))
    assert data_shape(catalog).leading_frames == 1
    pieces = replace(catalog.card.geometry, segment_frames=9)
    catalog.card = catalog.card.model_copy(update={"geometry": pieces})
    assert data_shape(catalog).leading_frames == 0


def test_leading_frames_are_the_datasets() -> None:
    for leading in (0, 1):
        found = architecture(settings(local_frames=2), replace(DATA, leading_frames=leading))
        assert found.layout.leading_frames == found.attention()["leading_frames"] == leading


def on_the_hub(folder: Path, variant: str) -> Path:
    """The repository owner/name with a pipeline, as the hub's client leaves it; returns its snapshot."""
    snapshot = folder / "models--owner--name" / "snapshots" / ("c" * 40)
    stock_model(variant).save_pretrained(snapshot / "transformer")
    refs = folder / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "v1").write_text("c" * 40)
    scheduler = snapshot / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    scheduler.write_text(json.dumps(Schedule(snr_shift_scale=2.0).scheduler_config()))
    return snapshot


def test_a_hub_id_is_its_pipelines_transformer_and_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = on_the_hub(tmp_path, "5b-i2v")
    model = ModelConfig(init="owner/name", revision="v1")
    found = architecture(model, DATA)
    assert found.config == tiny_architecture("5b-i2v").config
    assert found.layout.image
    assert found.layout.learned
    assert found.schedule.snr_shift_scale == 2.0
    assert found == architecture(ModelConfig(init=str(snapshot)), DATA)
    expected = packed_model("5b-i2v")
    read = initial_values("owner/name", expected, seed=0, revision="v1")
    for name, value in expected.state_dict().items():
        assert torch.equal(read(name, (slice(0, 3),)), value[:3]), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A transformer with the schedule it was trained on, as an export has them."""
    stock_model("5b").save_pretrained(tmp_path / "5b")
    scheduler = tmp_path / "5b" / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    scheduler.write_text(json.dumps(Schedule(snr_shift_scale=2.0).scheduler_config()))
    return tmp_path / "5b"


def test_without_a_scheduler_the_schedule_is_that_of_the_family(folder: Path, tmp_path: Path) -> None:
    assert architecture(ModelConfig(init=str(folder)), DATA).schedule.snr_shift_scale == 2.0
    for variant, scale in (("5b", 1.0), ("2b", 3.0)):
        stock_model(variant).save_pretrained(tmp_path / "alone")
        found = architecture(ModelConfig(init=str(tmp_path / "alone")), DATA)
        assert found.schedule == Schedule(snr_shift_scale=scale)


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
    folder: Path, data: DataShape, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        architecture(ModelConfig(init=str(folder)), data)


def test_a_config_of_another_kind_of_model_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"lora_rank": 4}))
    with pytest.raises(ConfigError, match="does not know: lora_rank"):
        architecture(ModelConfig(init=str(folder)), DATA)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "[]", "expected a table of settings, found list"),
        ("config.json", '{"in_channels": "16"}', "in_channels = '16', expected one like 16"),
        (f"{WEIGHTS}.safetensors.index.json", '{"weight_map": 3}', "no weight_map"),
        (f"{WEIGHTS}.safetensors", "cut short", "cannot be read.*fetch it again"),
        ("scheduler/scheduler_config.json", "{", "cannot be read"),
        ("scheduler/scheduler_config.json", "{}", "_class_name = '': expected a scheduler"),
    ],
)
def test_a_damaged_folder_is_named(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)

    def start() -> None:
        architecture(ModelConfig(init=str(folder)), DATA)
        initial_values(str(folder), packed_model("5b"), seed=0)

    with pytest.raises(ConfigError, match=message):
        start()


def test_weights_beside_adapters_are_refused(folder: Path) -> None:
    (folder / LORA_NAME).touch()
    with pytest.raises(ConfigError, match=r"would be left out; give a folder that was exported with --merge"):
        architecture(ModelConfig(init=str(folder)), DATA)


def test_a_dataset_of_another_encoder_is_refused(tmp_path: Path) -> None:
    data = data_shape(Catalog(write_dataset(tmp_path / "set", scaling=Scaling(rule="factor", factor=0.9))))
    stock_model("5b", in_channels=16, out_channels=16, text_embed_dim=24).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / INPUTS_NAME).write_text(json.dumps({"latents": {"scaling": {"factor": 0.7}}}))
    with pytest.raises(ConfigError, match="the dataset is not what these weights were trained on"):
        architecture(ModelConfig(init=str(tmp_path / "model")), replace(data, prompt=(7, 24)))


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found no config\.json"):
        architecture(ModelConfig(init=str(tmp_path)), DATA)


@pytest.mark.parametrize("name", ["run", "run/checkpoints", "run/checkpoints/step-000003"])
def test_a_run_is_exported_before_it_starts_another(tmp_path: Path, name: str) -> None:
    init = tmp_path / name
    step = tmp_path / "run" / "checkpoints" / "step-000003"
    step.mkdir(parents=True)
    (step / META_NAME).write_text("{}")
    with pytest.raises(ConfigError, match=rf"`latentpress export-model {init} OUT`, and --merge"):
        architecture(ModelConfig(init=str(init)), DATA)
    # A model is one whatever lies beside it.
    stock_model("5b").save_pretrained(init)
    architecture(ModelConfig(init=str(init)), DATA)


def test_a_model_of_another_class_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKLCogVideoX"}')
    with pytest.raises(ConfigError, match=r"of class AutoencoderKL.*3DModel; give a model of that class"):
        architecture(ModelConfig(init=str(folder)), DATA)


def test_an_image_to_video_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    stock_model("5b-i2v").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="out_channels = 4, the dataset has 8"):
        architecture(ModelConfig(init=str(tmp_path)), DataShape((3, 8, 16, 24), 4, (7, 12)))


def test_learned_positions_are_for_the_clips_they_were_learned_with() -> None:
    layout = tiny_architecture("5b-i2v").layout
    check_clips([(3, 16, 24)], layout)
    check_clips([(3, 16, 16), (9, 8, 8)], tiny_architecture("5b").layout)
    for shape in ((3, 16, 16), (2, 16, 24)):
        with pytest.raises(ConfigError, match=r"clips of 3 x 16 x 24 latents .*; set the stage's filter"):
            check_clips([(3, 16, 24), shape], layout)


def test_the_loader_knows_the_shapes_of_all_windows(tmp_path: Path) -> None:
    catalog = Catalog(write_dataset(tmp_path / "set"))
    whole = {(t, h, w) for t, _, h, w in catalog.shapes.tolist()}
    stage: dict[str, Any] = {"name": "cut", "steps": 1, "max_frames": 1, "lr": {"peak": 0.0}}
    for stages, expected in (
        ([stage | {"max_frames": None}], whole),
        ([stage], {(1, h, w) for _, h, w in whole}),
    ):
        tree = {"dataset": str(tmp_path / "set"), "output": str(tmp_path), "stages": stages}
        with Loader(catalog, config=TrainConfig.model_validate(tree)) as loader:
            assert loader.latent_shapes() == expected
    assert len(whole) > 1


def test_settings_that_a_model_cannot_have_are_refused(tmp_path: Path) -> None:
    stock_model("5b-i2v").save_pretrained(tmp_path / "i2v")
    dataset, images = (
        write_dataset(tmp_path / "set"),
        write_dataset(tmp_path / "images", image="first_latent"),
    )
    without_images = data_shape(Catalog(images), Catalog(dataset))
    stock_model("5b").save_pretrained(tmp_path / "5b")
    for changes, data, message in (
        ({"init": str(tmp_path / "5b"), "num_layers": 3}, DATA, r"model\.num_layers = 3, it has 2; remove"),
        ({"init": str(tmp_path / "5b"), "patch_size_t": 2}, DATA, r"model\.patch_size_t = 2, it has 1;"),
        (
            {"init": str(tmp_path / "5b"), "image_condition": True},
            DATA,
            "image_condition = True, it has False",
        ),
        ({"text": "cross"}, DATA, "is for model.kind = 'dit'"),
        ({"local_frames": 3, "patch_size_t": 2}, DATA, "local_frames = 3: expected a multiple of 2"),
        ({"init": str(tmp_path / "i2v"), "num_layers": 2, "local_frames": 2}, DATA, "leave local_frames = 0"),
        ({"init": str(tmp_path / "i2v"), "kind": "dit"}, DATA, "is of class CogVideoX.*; set model.kind"),
        (
            {"image_condition": True},
            without_images,
            f"and {dataset} has no latents of it: preprocess with vid",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            architecture(settings(**changes), data)
