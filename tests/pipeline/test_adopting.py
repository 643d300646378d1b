"""Model files that changed: a worker with others stops the run, --adopt takes on the same numbers only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.inspect import inspect_sample
from jobs.verify import verify
from pipeline.encoders import Encoders
from pipeline.fidelity import card_encoder, decode
from pipeline.graph import preprocess
from pipeline.tiny_t5 import TinyT5
from schemas.adoption import read_adoptions
from schemas.card import read_card
from schemas.config import PreprocessConfig
from schemas.errors import ConfigError, DatasetError, RunError, StaleDatasetError
from schemas.load import load_config
from tests.pipeline.hungry import manifest_of
from tests.pipeline.test_tiling import CONFIG
from tests.pipeline.tiny_vaes import save_vae
from tests.videos import make_video

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def config(tmp_path: Path) -> PreprocessConfig:
    """Two clips, and a CogVideoX VAE."""
    save_vae("cogvideox", tmp_path / "vae")
    for name in ("0.mp4", "1.mp4"):
        make_video(tmp_path / name, num_frames=9)
    manifest_of(tmp_path, ["0.mp4", "1.mp4"])
    (tmp_path / "config.toml").write_text(CONFIG.format(folder=tmp_path))
    return load_config(
        tmp_path / "config.toml",
        PreprocessConfig,
        overrides=[f"output={tmp_path / 'out'}", "video_encoder.tiling=off"],
    )


def saved_anew(folder: Path, *, noise: float = 0.0) -> None:
    """The same tensors in another file, or others."""
    weights = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    changed = {n: w + noise * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    save_file(changed, folder / WEIGHTS, metadata={"format": "pt", "note": "again"})


def test_weights_are_adopted_where_they_make_the_same_numbers(
    config: PreprocessConfig, tmp_path: Path
) -> None:
    preprocess(config)
    saved_anew(tmp_path / "vae")
    with pytest.raises(StaleDatasetError, match=r"weights_sha256(?s:.*)--adopt goes on"):
        preprocess(config)
    preprocess(config, adopt=True)
    assert [list(record["fields"]) for record in read_adoptions(tmp_path / "out")] == [
        ["video_encoder.weights_sha256"]
    ]


def test_other_weights_are_refused_by_how_far_they_are(config: PreprocessConfig, tmp_path: Path) -> None:
    preprocess(config)
    saved_anew(tmp_path / "vae", noise=0.1)
    with pytest.raises(StaleDatasetError, match=r"other latents: they differ by \d+\.\d+, at most 0\.05"):
        preprocess(config, adopt=True)
    for name in ("0.mp4", "1.mp4"):
        (tmp_path / name).rename(tmp_path / f"aside-{name}")
    (tmp_path / "2.mp4").write_bytes((tmp_path / "aside-0.mp4").read_bytes() + b"\0")
    manifest_of(tmp_path, ["2.mp4"])
    with pytest.raises(
        StaleDatasetError, match=r"source file .* is gone\. Put a source back, such as \d\.mp4"
    ):
        preprocess(config, adopt=True)
    assert read_adoptions(tmp_path / "out") == []


def test_where_nothing_is_stored_there_is_nothing_to_hold(
    config: PreprocessConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.graph.run_units", lambda *_, **__: {"stopped": "before the first unit"})
        with pytest.raises(RunError, match="before the first unit"):
            preprocess(config)
    saved_anew(tmp_path / "vae", noise=0.1)
    summary, _ = preprocess(config, adopt=True)
    assert summary["kept"] == 2


@pytest.mark.parametrize("shift", [0.0, 0.01, 1.0])
def test_a_text_encoder_is_held_against_stored_prompts(
    config: PreprocessConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    preprocess(config)

    class Other(TinyT5):
        def hard_fields(self) -> dict[str, Any]:
            return {**super().hard_fields(), "weights_sha256": "0" * 64}

        def encode(self, captions: Any) -> Any:
            found = super().encode(captions)
            for each in found:
                if each.num_tokens > 1:  # the empty prompt alone does not tell
                    each.tensors["prompt_embeds"].data[:] += shift
            return found

    def load(config: Any) -> Other:
        return Other(max_length=config.max_length, padding=config.padding)

    for module in ("graph", "encoders", "adopting"):
        monkeypatch.setattr(f"pipeline.{module}.load_text_encoder", load)
    if shift == 1.0:
        with pytest.raises(StaleDatasetError, match=r"gives .* other embeddings: they differ by "):
            preprocess(config, adopt=True)
    else:
        preprocess(config, adopt=True)
    assert len(read_adoptions(tmp_path / "out")) == (shift != 1.0)


def test_a_worker_with_other_files_stops_the_run(
    config: PreprocessConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where each machine has its own copy."""
    preprocess(config)
    card = read_card(tmp_path / "out")
    assert Encoders(config, card).video({}).name == "diffusers"
    saved_anew(tmp_path / "vae")
    with pytest.raises(
        RunError, match=r"video_encoder\.weights_sha256 is '.*' on .*card says .* Copy the model"
    ):
        Encoders(config, card).video({})
    preprocess(config, adopt=True)
    assert Encoders(config, card).video({}).name == "diffusers"
    monkeypatch.setattr(TinyT5, "hard_fields", lambda self: {"kind": "tiny-t5", "config": {}})
    with pytest.raises(RunError, match=r"text_encoder\.config is \{\} on "):
        Encoders(config, card).text({})


def test_a_vae_that_moved_is_named_and_must_be_the_same(
    config: PreprocessConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess(config)
    (tmp_path / "vae").rename(tmp_path / "moved")
    root, moved = tmp_path / "out", str(tmp_path / "moved")
    with pytest.raises(DatasetError, match="--vae FOLDER names where it is now"):
        inspect_sample(root, output=tmp_path / "a.png")
    inspect_sample(root, output=tmp_path / "a.png", vae=moved)
    arguments: dict[str, Any] = {"config": None, "overrides": [], "min_psnr": 0.0, "as_json": True}
    assert verify(root, samples=1, vae=moved, **arguments) == 0
    assert json.loads(capsys.readouterr().out)["fidelity"]["passed"]
    with pytest.raises(ConfigError, match="--vae decodes samples again; give --sample N"):
        verify(root, samples=0, vae=moved, **{**arguments, "min_psnr": None})
    saved_anew(Path(shutil.copytree(moved, tmp_path / "other")), noise=0.1)
    with pytest.raises(StaleDatasetError, match=r"encoded with video_encoder\.weights_sha256 = "):
        inspect_sample(root, vae=str(tmp_path / "other"))


def test_decoding_that_runs_out_of_memory_is_done_in_tiles_or_says_what_to_do(
    config: PreprocessConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    preprocess(config)
    encoder = card_encoder(tmp_path / "out", read_card(tmp_path / "out"))
    latents = torch.zeros(1, 4, 4, 4).numpy()
    whole = encoder.decode
    room = "tiles"

    def starved(latents: Any, *, tiled: bool = False) -> Any:
        if tiled and room == "tiles":
            return whole(latents, tiled=True)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(encoder, "decode", starved)
    assert decode(encoder, latents, tiled=False).shape == (1, 32, 32, 3)
    assert "decoded in tiles" in capsys.readouterr().err
    room = "none"
    with pytest.raises(RunError, match=r"1x4x4x4 latents ran out of memory .*video_encoder\.device = 'cpu'"):
        decode(encoder, latents, tiled=False)
