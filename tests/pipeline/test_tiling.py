"""A real VAE, tiny, through the job: batches, tiles, and everything that later reads the card's tiling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.inspect import inspect_sample
from jobs.plan import plan
from jobs.verify import verify
from pipeline.encoders import Encoders
from pipeline.fidelity import Fidelity, choose_samples, compare
from pipeline.graph import preprocess
from pipeline.starved import ProcessDied
from schemas.card import read_card
from schemas.codec import as_float32
from schemas.config import ExecutorConfig, LimitsConfig, PreprocessConfig, SourcesConfig
from schemas.errors import RunError
from schemas.index import read_index, read_tensor
from schemas.load import load_config
from tests.pipeline.hungry import manifest_of
from tests.pipeline.tiny_vaes import save_vae
from tests.videos import make_video

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
BUCKET = "5x80x96"
CONFIG = """
manifest = "{folder}/manifest.jsonl"
output = "{folder}/unset"
[[buckets]]
num_frames = 5
height = 80
width = 96
[video_encoder]
kind = "diffusers"
model = "{folder}/vae"
[executor]
kind = "local"
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips, and a CogVideoX VAE whose tiles are smaller than their bucket."""
    folder = tmp_path_factory.mktemp("tiny")
    save_vae("cogvideox", folder / "vae", sample_height=96, sample_width=80)
    names = [f"{i}.mp4" for i in range(3)]
    for i, name in enumerate(names):
        make_video(folder / name, num_frames=7 + i)
    manifest_of(folder, names)
    path = folder / "config.toml"
    path.write_text(CONFIG.format(folder=folder))
    return path


def run(config: Path, output: Path, **video: Any) -> dict[str, np.ndarray]:
    """Source -> mean of what preprocess stores."""
    overrides = [f"video_encoder.{name}={json.dumps(value)}" for name, value in video.items()]
    preprocess(load_config(config, PreprocessConfig, overrides=[f"output={output}", *overrides]))
    rows = read_index(output).to_pylist()
    return {row["source"]: as_float32(read_tensor(output, row, "mean")) for row in rows}


@pytest.fixture(scope="module")
def tiled(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiled") / "out"
    run(config, root, tiling="on", batch_size=2)
    return root


def test_batches_and_tiles_change_what_they_should(config: Path, tiled: Path, tmp_path: Path) -> None:
    alone = run(config, tmp_path / "alone")
    batched = run(config, tmp_path / "batched", batch_size=3)
    assert alone.keys() == batched.keys()
    assert len(alone) == 3
    for source, mean in alone.items():
        assert np.allclose(mean, batched[source], rtol=0, atol=1e-5)
    cards = [read_card(tmp_path / name) for name in ("alone", "batched")]
    assert cards[0].fingerprint == cards[1].fingerprint  # the trial found that a clip fits
    assert cards[0].hard["latents"]["video_encoder.tiling"] == {BUCKET: False}

    row = read_index(tiled).to_pylist()[0]
    in_tiles = as_float32(read_tensor(tiled, row, "mean"))
    assert np.abs(in_tiles - alone[row["source"]]).max() > 1e-3
    assert read_card(tiled).hard["latents"]["video_encoder.tiling"][BUCKET]


def test_what_is_encoded_again_is_encoded_in_the_cards_tiles(
    tiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = read_card(tiled)
    rows = choose_samples(tiled, card, 3)
    asked: list[bool] = []

    def decode(self: Any, latents: np.ndarray, *, tiled: bool = False) -> np.ndarray:
        asked.append(tiled)
        return np.full((5, 80, 96, 3), 128, np.uint8)

    monkeypatch.setattr("pipeline.vae.DiffusersEncoder.decode", decode)
    for found in compare(tiled, card, rows, limits=LimitsConfig(), sources=SourcesConfig()):
        assert isinstance(found, Fidelity)
        assert found.difference < 1e-5
    inspect_sample(tiled, output=tmp_path / "sheet.png")
    assert asked == [True] * 4


def test_a_trial_that_the_kernel_ends_says_what_to_set(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise ProcessDied("a process that Ray ran died (it is gone)")

    monkeypatch.setattr("pipeline.tiling.in_worker", killed)
    with pytest.raises(RunError, match=r"the kernel may have .* Set video_encoder\.tiling = 'on'"):
        run(config, tmp_path / "out")


def test_a_worker_keeps_to_its_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", asked.append)
    for share in (0.25, 1, 0, None):
        executor = ExecutorConfig(gpus_per_worker=share)
        Encoders(PreprocessConfig(manifest="m", output="o", executor=executor)).video({})
    assert asked == [0.25]


def test_plan_and_verify_take_the_cards_tiling_and_try_nothing(
    config: Path, tiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(output: Path, *more: str) -> tuple[int, dict[str, Any]]:
        code = plan(config, overrides=[f"output={output}", *more], as_json=True)
        return code, json.loads(capsys.readouterr().out)

    sizes = read_card(tiled).hard["latents"]["video_encoder.tiling"]
    code, report = planned(tiled)
    assert (code, report["tiling"]) == (0, sizes)
    code, report = planned(tiled, "video_encoder.tiling=off")
    assert code == 2
    assert list(report["other_settings"]["latents"]["differences"]) == ["video_encoder.tiling"]
    assert planned(tmp_path / "new")[1]["tiling"].startswith("found out at the start")
    arguments: dict[str, Any] = {"samples": 0, "min_psnr": None, "as_json": True}
    assert verify(tiled, config=config, overrides=[f"output={tiled}"], **arguments) == 0
