"""Finding a model: folders, pipelines, the hub's cache without a network; what is not to be had says so."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.video_encode import load_video_encoder
from schemas.config import VideoEncoderConfig
from schemas.errors import ConfigError
from schemas.model_files import ModelFiles, commit_of, find_model
from tests.pipeline.tiny_vaes import save_vae

WEIGHTS = b"weights"


def write_model(folder: Path, *, names: tuple[str, ...] = ("w.safetensors",)) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_class_name": "Some"}')
    for name in names:
        (folder / name).write_bytes(WEIGHTS + name.encode())
    return folder


def find(model: str | Path, **settings: Any) -> ModelFiles:
    return find_model(
        str(model), **{"subfolder": "vae", "key": "video_encoder.model", "weights": "w", **settings}
    )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_folder_is_the_model_or_a_pipeline_that_holds_it(tmp_path: Path) -> None:
    alone = find(write_model(tmp_path / "alone"))
    within = find(write_model(tmp_path / "pipeline" / "vae").parent)
    assert alone.config == within.config == {"_class_name": "Some"}
    assert within.folder == tmp_path / "pipeline" / "vae"
    assert alone.weights_sha256() == within.weights_sha256() == sha256(WEIGHTS + b"w.safetensors")


def test_weights_in_several_files_have_one_digest(tmp_path: Path) -> None:
    names = ("w-2.safetensors", "w-1.safetensors")
    folder = write_model(tmp_path / "model", names=names)
    index = {"weight_map": dict(zip("abc", (*names, names[0]), strict=True))}
    (folder / "w.safetensors.index.json").write_text(json.dumps(index))
    first = find(folder)
    assert [path.name for path in first.weights] == sorted(names)
    digest = first.weights_sha256()
    (folder / names[0]).write_bytes(b"other weights")
    assert find(folder).weights_sha256() != digest


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"found no config\.json in .*empty/vae' nor in .*empty'"):
        find(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"lacks w\.safetensors; expected its weights as safetensors"):
        find(write_model(tmp_path / "bare", names=("w.bin",)))
    with pytest.raises(ConfigError, match=r"is a folder, and revision = 'v2' names one of a hub id"):
        find(write_model(tmp_path / "model"), revision="v2")
    (tmp_path / "model" / "config.json").write_text("no json")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        find(tmp_path / "model")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fill(cache: Path, *, digest: str) -> Path:
    """The repository owner/name as the hub's client leaves it, its weights a link to a blob."""
    repository = cache / "models--owner--name"
    commit = "c" * 40
    folder = write_model(repository / "snapshots" / commit / "vae", names=())
    blob = repository / "blobs" / digest
    blob.parent.mkdir()
    blob.write_bytes(WEIGHTS)
    (folder / "w.safetensors").symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return repository


def test_a_cached_model_needs_no_network_and_no_hashing(cache: Path) -> None:
    fill(cache, digest="a" * 64)
    found = find("owner/name")
    assert found.folder.name == "vae"
    assert found.weights_sha256() == "a" * 64
    assert find("owner/name", revision="c" * 40).weights_sha256() == "a" * 64


def test_a_blob_that_is_not_called_by_its_sha256_is_hashed(cache: Path) -> None:
    fill(cache, digest="b" * 40)
    assert find("owner/name").weights_sha256() == sha256(WEIGHTS)


@pytest.mark.parametrize("lost", [None, "blobs", "refs"])
def test_a_model_that_is_not_to_be_had_is_one_sentence(cache: Path, lost: str | None) -> None:
    if lost:
        shutil.rmtree(fill(cache, digest="a" * 64) / lost)
    with pytest.raises(ConfigError) as error:
        find("owner/name")
    assert str(error.value).startswith("video_encoder.model")
    assert "owner/name" in str(error.value) or "models--owner--name" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="expected a folder that exists, or a hub id OWNER/NAME"):
        find("/no/such/folder")


def encoder(folder: Path) -> None:
    load_video_encoder(VideoEncoderConfig(kind="diffusers", model=str(folder), device="cpu")).load()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "AutoencoderKLLTX2Audio"}, "is a AutoencoderKLLTX2Audio: expected one of Auto"),
        ({"_class_name": "CogVideoXTransformer3DModel"}, "is a CogVideoXTransformer3DModel: expected one of"),
        ({"model_type": "t5"}, "expected a VAE in the layout of diffusers"),
        ({"_class_name": "AutoencoderKLWan", "dim_mult": 3}, "does not describe a AutoencoderKLWan"),
    ],
)
def test_what_is_no_known_vae_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = write_model(tmp_path / "model", names=("diffusion_pytorch_model.safetensors",))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        encoder(folder)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    """The library draws what is missing, and only warns."""
    folder = save_vae("wan2.1", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_res_blocks": 2}))
    with pytest.raises(ConfigError, match=r"are not those its config\.json describes: \d+ are missing"):
        encoder(folder)
    (folder / "config.json").write_text(json.dumps({**config, "base_dim": 8}))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        encoder(folder)
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "a_buffer_of_another_version": torch.zeros(1)}, path)
    encoder(folder)  # is no part of what encodes or decodes
    save_file({**weights, "encoder.another.weight": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"1 are not in it, such as encoder\.another\.weight"):
        encoder(folder)


def test_what_the_cache_lacks_of_the_pipeline_is_asked_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = fill(cache, digest="a" * 64) / "snapshots" / ("c" * 40)
    asked: list[Any] = []
    download = huggingface_hub.snapshot_download

    def watched(*arguments: Any, **named: Any) -> str:
        asked.append(named.get("allow_patterns"))
        return str(download(*arguments, **named))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watched)

    def needs(folder: Path) -> bool:
        return (folder.parent / "tokenizer.json").is_file()

    find("owner/name", beside=("tokenizer.json",), has_all=needs)
    assert "tokenizer.json" in asked[-1]
    asked.clear()
    (snapshot / "tokenizer.json").write_text("{}")
    find("owner/name", beside=("tokenizer.json",), has_all=needs)
    assert asked == ["vae/config.json"]


def test_a_hub_id_stands_for_the_commit_that_is_here(cache: Path, tmp_path: Path) -> None:
    fill(cache, digest="a" * 64)
    assert commit_of("owner/name", "") == commit_of("owner/name", "main") == "c" * 40
    assert commit_of(str(tmp_path), "") == ""
