"""`bench encode`: every variant measured, the run held against the encoder, what cannot run named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import random_models
from jobs.bench_encode import encode
from schemas.errors import ConfigError
from tests.videos import make_video

CONFIG = """
manifest = "{folder}/manifest.jsonl"
output = "{folder}/latents"
[[buckets]]
num_frames = 5
height = 32
width = 48
[executor]
kind = "local"
workers = 1
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rows = []
    for i in range(3):
        make_video(tmp_path / f"{i}.mp4", num_frames=9 + i)
        rows.append(json.dumps({"video": f"{i}.mp4", "caption": f"clip {i}"}))
    (tmp_path / "manifest.jsonl").write_text("\n".join(rows))
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


def run(config: Path, **options: object) -> dict[str, object]:
    json_path = config.with_name("numbers.json")
    settings = {
        "overrides": (),
        "dtypes": "",
        "random": "",
        "text": True,
        "tiling": False,
        "compile": False,
        "with_run": True,
        "rows": 2,
        "batches": 2,
        "reps": 1,
        "plot_path": None,
        "results": config.parent,
        **options,
    }
    assert encode(config, json_path=json_path, **settings) == 0  # type: ignore[arg-type]
    report: dict[str, object] = json.loads(json_path.read_text())
    return report


@pytest.mark.slow
def test_measures_encoders_and_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = config.with_name("plot.png")
    report = run(config, plot_path=plot)
    first = report["video"][0]  # type: ignore[index]
    assert first["bucket"] == "5x32x48"
    assert first["frames_per_s"] == pytest.approx(5 * first["clips_per_s"], rel=0.01)
    assert first["peak_bytes"] >= 0
    assert "text" not in report  # the embedded one is not worth measuring
    assert report["end_to_end"]["clips"] == 2  # type: ignore[index]
    assert 0 < report["end_to_end"]["of_ceiling"] < 2  # type: ignore[index]
    assert plot.stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "5x32x48" in shown
    assert "of the encoder fed from memory" in shown
    assert (config.parent / "encode.jsonl").read_text().count("\n") == 1


def test_names_what_it_does_not_know(config: Path) -> None:
    with pytest.raises(ConfigError, match="expected some of float32, bfloat16, float16, found 'float8'"):
        run(config, dtypes="float8")
    with pytest.raises(ConfigError, match=r"expected one of cogvideox, wan2\.1"):
        run(config, random="sora")


def test_published_shapes_exist_in_the_library() -> None:
    import diffusers
    import torch
    import transformers

    for shape in random_models.SHAPES.values():
        with torch.device("meta"):
            model = getattr(diffusers, shape.vae)(**shape.arguments)
        assert sum(weight.numel() for weight in model.parameters()) > 50e6
        assert hasattr(transformers, shape.text)
