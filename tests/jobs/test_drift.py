"""Clips as long as their rows, from files to training windows; and what `inspect --drift` says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.drift import meaning, run
from jobs.inspect import inspect_sample
from jobs.plan import plan
from jobs.validate import validate
from jobs.verify import verify
from pipeline.graph import preprocess
from pipeline.windows import Drift
from schemas.adoption import refuse_stale
from schemas.bucket import video_tokens
from schemas.card import read_card
from schemas.codec import as_float32
from schemas.config import PreprocessConfig
from schemas.errors import ConfigError, DatasetError, StaleDatasetError
from schemas.index import read_index, read_tensor
from schemas.load import load_config
from schemas.train_config import LrConfig, StageConfig, TrainConfig
from tests.videos import make_video
from trainer.catalog import Catalog
from trainer.loader import Loader

CONFIG = """
manifest = "{folder}/manifest.jsonl"
output = "{folder}/latents"
[frames]
policy = "fps"
target_fps = 4
clips = "whole"
short = "drop"
[[buckets]]
num_frames = 41
height = 32
width = 48
[target]
frame_multiple = 8
[executor]
kind = "local"
workers = 1
[quarantine]
max_rate = 0.5
"""
LENGTHS = {"beyond": 41, "full": 41, "long": 33, "short": 9, "slow": 41}


def make_dataset(folder: Path, *changes: str) -> Path:
    """At 4 frames a second of 52, 41, 40, 12 and 8, and of 44 where there are 11 pictures."""
    folder.mkdir()
    for name, num_frames in (("beyond", 104), ("full", 82), ("long", 80), ("short", 24), ("dropped", 16)):
        make_video(folder / f"{name}.mp4", num_frames=num_frames, fps=8)
    make_video(folder / "slow.mp4", num_frames=11, fps=1)
    rows = [{"video": f"{name}.mp4", "caption": name} for name in (*LENGTHS, "dropped")]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    preprocess(load_config(folder / "config.toml", PreprocessConfig, overrides=changes))
    return folder / "latents"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("whole") / "clips")


def rows_of(dataset: Path) -> dict[str, dict[str, Any]]:
    return {Path(row["source"]).stem: row for row in read_index(dataset).to_pylist()}


def test_every_clip_has_its_own_length_in_its_bucket(dataset: Path) -> None:
    rows = rows_of(dataset)
    assert {name: row["num_frames"] for name, row in rows.items()} == LENGTHS
    for name, row in rows.items():
        assert row["bucket"] == "41x32x48"
        assert row["shape"] == [(LENGTHS[name] - 1) // 4 + 1, 16, 4, 6]
        assert len(row["pts_s"]) == len(row["frame_weights"]) == LENGTHS[name]
        assert row["pts_s"] == [i // 4 if name == "slow" else i / 4 for i in range(LENGTHS[name])]
        assert row["num_tokens"] == video_tokens(row["shape"])
    assert verify(dataset, config=None, overrides=[], samples=5, min_psnr=None, as_json=False) == 0
    drawn = inspect_sample(dataset, sample="long", output=dataset.parent / "long.png")
    assert len(drawn["psnr"]["per_frame"]) == 33


def test_a_plan_counts_what_the_clips_are(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataset.parent / "config.toml"
    args: dict[str, Any] = {"overrides": ["output=" + str(dataset.parent / "new")], "as_json": True}
    assert plan(config, **args) == 0
    report, rows = json.loads(capsys.readouterr().out), rows_of(dataset)
    assert (report["clips"], report["frames"]) == (5, 165)
    assert report["frames_per_clip"] == {"41x32x48": [9, 41]}
    assert report["drops"] == {"too_short": 1}
    assert report["shorter_than_bucket"] == 0
    assert report["leftover_s"] == pytest.approx((52 - 41 + 40 - 33 + 12 - 9 + 44 - 41) / 4)
    assert report["video_tokens"] == sum(row["num_tokens"] for row in rows.values())
    stored = sum(row["mean_nbytes"] + row["logvar_nbytes"] for row in rows.values())
    assert report["latents_bytes"] == stored
    assert plan(config, **args | {"as_json": False}) == 0
    assert "9 to 41 in 41x32x48" in capsys.readouterr().out


def test_a_validation_tells_how_long_clips_would_be(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, manifest = dataset.parent / "config.toml", dataset.parent / "manifest.jsonl"
    args: dict[str, Any] = {"config": config, "overrides": [], "output": None}
    assert validate(manifest, **args, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["frames_per_clip"] == {"41x32x48": [9, 41]}
    assert validate(manifest, **args, as_json=False) == 0
    assert "9 to 41 in 41x32x48" in capsys.readouterr().out


def windows_read(dataset: Path, max_s: float) -> dict[str, int]:
    """Latent frames that a stage of the trainer reads of every sample."""
    catalog = Catalog(dataset)
    config = TrainConfig(
        dataset=str(dataset),
        output="unused",
        stages=(StageConfig(name="s", steps=1, max_s=max_s, lr=LrConfig(peak=1.0)),),
    )
    rows = {row["sample_id"]: name for name, row in rows_of(dataset).items()}
    with Loader(catalog, config=config) as loader:
        (pack,) = loader.packs(0)
    return {rows[segment.sample_id]: len(segment.latents) for segment in pack.segments}


def windows_measured(dataset: Path, sample: str, *more: str) -> dict[float, int]:
    """Latent frames of every window that `inspect --drift` measures."""
    result = CliRunner().invoke(app, ["inspect", str(dataset), sample, "--drift", "--json", *more])
    assert result.exit_code == 0, result.output
    return {each["seconds"]: each["latent_frames"] for each in json.loads(result.stdout)["windows"]}


@pytest.mark.parametrize("max_s", [3.0, 9.0])
def test_the_trainer_reads_the_windows_that_are_measured(dataset: Path, max_s: float) -> None:
    whole = {name: (num_frames - 1) // 4 + 1 for name, num_frames in LENGTHS.items()}
    read = windows_read(dataset, max_s)
    assert read == {name: min(of_clip, int(max_s) + 1) for name, of_clip in whole.items()}
    for name in ("beyond", "slow"):
        assert windows_measured(dataset, name)[max_s] == read[name] < whole[name]


def test_a_source_is_read_again_under_the_limits_of_the_config(dataset: Path, tmp_path: Path) -> None:
    text = (dataset.parent / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(text + "[limits]\nmax_frames = 5\n")
    again = ["-c", str(tmp_path / "config.toml")]
    result = CliRunner().invoke(app, ["inspect", str(dataset), "beyond", "--drift", *again])
    assert "limits.max_frames = 5; drift is measured on its frames" in str(result.exception)
    drawn = CliRunner().invoke(
        app, ["inspect", str(dataset), "beyond", "-o", str(tmp_path / "a.png"), "--json", *again]
    )
    assert "limits.max_frames = 5" in json.loads(drawn.stdout)["notes"][0]
    assert windows_measured(dataset, "beyond", "-c", str(dataset.parent / "config.toml"))


def test_another_target_makes_another_dataset(dataset: Path) -> None:
    """Under `whole` it decides how long clips are."""
    from pipeline.graph import wanted_card

    overrides = ["target.frame_multiple=4"]
    other = wanted_card(load_config(dataset.parent / "config.toml", PreprocessConfig, overrides=overrides))
    with pytest.raises(StaleDatasetError, match=r"target\.frame_multiple"):
        refuse_stale(dataset, have=read_card(dataset), want=other)


def test_drift_is_measured_and_told(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(app, ["inspect", str(dataset), "beyond", "--drift", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["num_frames"], report["fps"], report["encoder"]) == (41, 4.0, "dct")
    assert [(each["seconds"], each["num_frames"], each["prefix"]) for each in report["windows"]] == [
        (3.0, 13, 0.0),
        (9.0, 37, 0.0),
    ]
    assert [len(each["interior"]) for each in report["windows"]] == [4, 10]
    assert run(dataset, sample="beyond", as_json=False) == 0
    told = capsys.readouterr().out
    assert "3 s         13              4            exact" in told
    for kind in ("prefix", "slice", "segments"):
        assert f'window = "{kind}": {report["meaning"][kind]}' in told
    assert report["meaning"]["prefix"].startswith("exact: ")


def test_a_drift_is_no_picture(dataset: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(dataset), "--drift", "-o", "a.png"])
    assert isinstance(result.exception, ConfigError)


def test_nothing_to_measure_is_said(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has 9 frames, and its window of 3 s holds all of them"):
        run(dataset, sample="short", as_json=True)
    moved = dataset.parent / "long.mp4"
    moved.rename(tmp_path / "away.mp4")
    try:
        with pytest.raises(DatasetError, match="is gone; drift is measured on its frames"):
            run(dataset, sample="long", as_json=True)
    finally:
        (tmp_path / "away.mp4").rename(moved)


def test_whole_clips_in_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Segments of 9 frames: of the same rows 36, but 9 of the short one."""
    changes = ("video_encoder.segment_frames=9", "buckets.0.num_frames=36", "target.frame_multiple=1")
    dataset = make_dataset(tmp_path / "clips", *changes)
    rows = rows_of(dataset)
    assert {name: row["num_frames"] for name, row in rows.items()} == dict.fromkeys(LENGTHS, 36) | {
        "short": 9
    }
    assert rows["long"]["shape"] == [12, 16, 4, 6]
    first = [as_float32(read_tensor(dataset, rows[name], "mean"))[:3] for name in ("long", "full")]
    np.testing.assert_array_equal(first[0], first[1])
    assert verify(dataset, config=None, overrides=[], samples=4, min_psnr=None, as_json=False) == 0
    capsys.readouterr()
    assert run(dataset, sample="beyond", as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(each["num_frames"], each["prefix"], max(each["interior"])) for each in report["windows"]] == [
        (9, 0, 0)
    ]
    # The trainer reads whole pieces, at least one.
    assert [windows_read(dataset, max_s)["beyond"] for max_s in (1.0, 3.0, 4.0, 4.25)] == [3, 3, 3, 6]
    assert report["meaning"]["segments"].startswith("exact: ")


def test_what_is_not_exact_is_told_with_its_size() -> None:
    told = meaning([Drift(3.0, 49, 13, prefix=0.5, first=6, interior=(0.9, 0.2))], segment_frames=0)
    assert told["prefix"].startswith("not exact at 3 s: up to 0.5")
    assert "0.9 (root mean square)" in told["slice"]
    assert "0.2" in told["slice"]
