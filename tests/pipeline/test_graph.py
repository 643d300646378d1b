"""The main job on small real videos: every row accounted for, the same bytes from every route, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import graph
from pipeline.graph import preprocess
from pipeline.progress import EARLY_STOP_ROWS
from pipeline.shard_writer import ShardWriter
from schemas.check import check_dataset
from schemas.config import PreprocessConfig
from schemas.errors import ClipError, ConfigError, ManifestError, RunError, StaleDatasetError
from schemas.index import read_index, read_quarantine
from schemas.load import check_config
from schemas.manifest import ManifestRow
from tests.videos import make_video

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rows: three kinds of good video, one short, one broken, one a window of the first."""
    folder = tmp_path_factory.mktemp("videos")
    make_video(folder / "a.mp4", num_frames=30)
    make_video(folder / "b.mkv", codec="mpeg4", num_frames=25, size=(64, 96))
    make_video(folder / "short.mp4", num_frames=5)
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:700])
    make_video(folder / "c.mp4", num_frames=40, fps=30)
    rows: list[dict[str, Any]] = [
        {"video": name, "caption": f"a clip called {name}"}
        for name in ("a.mp4", "b.mkv", "short.mp4", "broken.mp4", "c.mp4")
    ]
    rows.append({"video": "a.mp4", "caption": "its start", "end_s": 0.5, "tag": "window"})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_for(manifest: Path, output: Path, **changes: Any) -> PreprocessConfig:
    tree: dict[str, Any] = {
        "manifest": str(manifest),
        "output": str(output),
        "buckets": [
            {"num_frames": 9, "height": 32, "width": 48},
            {"num_frames": 9, "height": 48, "width": 32},
        ],
        "units": {"rows": 2},
        "executor": {"kind": "local"},
    }
    return check_config(tree | changes, PreprocessConfig, where="test")


def shard_hashes(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*.tar")
    }


@pytest.fixture(scope="module")
def dataset(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("out") / "latents"
    _, ran = preprocess(config_for(manifest, root))
    assert ran
    return root


def test_every_row_is_kept_or_quarantined_once(dataset: Path) -> None:
    rows = read_index(dataset).to_pylist()
    assert sorted(row["source"] for row in rows) == ["a.mp4", "a.mp4", "b.mkv", "c.mp4", "short.mp4"]
    (failed,) = read_quarantine(dataset).to_pylist()
    assert failed["source"] == "broken.mp4"
    assert failed["message"]
    assert check_dataset(dataset).clean
    by_caption = {row["caption"]: row for row in rows}
    assert by_caption["a clip called b.mkv"]["bucket"] == "9x48x32"
    assert by_caption["a clip called short.mp4"]["num_interpolated"] > 0
    assert by_caption["a clip called a.mp4"]["num_interpolated"] == 0
    window = by_caption["its start"]
    assert max(window["pts_s"]) < 0.5 <= max(by_caption["a clip called a.mp4"]["pts_s"])
    assert json.loads(window["extra"]) == {"tag": "window"}


def test_running_again_does_nothing(dataset: Path, manifest: Path) -> None:
    before = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    summary, ran = preprocess(config_for(manifest, dataset))
    assert not ran
    assert summary["kept"] == 5
    assert {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == before


def test_a_lost_unit_alone_is_made_again_with_the_same_bytes(manifest: Path, tmp_path: Path) -> None:
    root = tmp_path / "latents"
    preprocess(config_for(manifest, root))
    before = shard_hashes(root)
    (root / "commits/00/u00000001.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in root.rglob("*.tar") if "u00000001" not in path.name}
    summary, ran = preprocess(config_for(manifest, root))
    assert ran
    assert summary["last_run"]["latents"]["clips"] == 2
    assert shard_hashes(root) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("workers", "decode_actors"), [(2, 0), (1, 2)])
def test_ray_gives_the_bytes_of_the_local_route(
    dataset: Path, manifest: Path, tmp_path: Path, workers: int, decode_actors: int
) -> None:
    root = tmp_path / "latents"
    executor = {"kind": "ray", "workers": workers, "decode_actors": decode_actors}
    summary, _ = preprocess(config_for(manifest, root, executor=executor))
    assert summary["last_run"]["executor"] == {"kind": "ray", "workers": workers}
    assert len(shard_hashes(root)) == 7
    assert shard_hashes(root) == shard_hashes(dataset)
    assert read_index(root).equals(read_index(dataset))


@pytest.mark.parametrize(("clips", "starts"), [("chunk", [0, 9, 18]), ("slide", [0, 12])])
def test_one_row_makes_several_samples(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clips: str, starts: list[int]
) -> None:
    root = tmp_path / "latents"
    frames = {"policy": "fps", "target_fps": 24.0, "clips": clips, "slide_step": 12}
    config = config_for(manifest, root, frames=frames)
    summary, _ = preprocess(config)
    rows = [row for row in read_index(root).to_pylist() if row["source"] == "c.mp4"]
    assert [row["clip"] for row in rows] == list(range(len(starts)))
    assert len({row["sample_id"] for row in rows}) == len(starts)
    for row, start in zip(rows, starts, strict=True):  # 40 pictures at 30 fps are 32 frames at 24 fps
        assert row["pts_s"] == pytest.approx([(start + i) * 5 // 4 / 30 for i in range(9)], abs=1e-6)
    assert summary["rows"] == 6
    assert summary["clips"] == summary["kept"] + summary["quarantined"] == read_index(root).num_rows + 1
    assert check_dataset(root).clean

    looked_at: list[str] = []

    def watched(rows: Iterable[ManifestRow], config: PreprocessConfig) -> Iterator[tuple[Any, Any]]:
        for row in rows:
            looked_at.append(row.source)
            yield row, ClipError("open_failed", "still")

    monkeypatch.setattr("pipeline.generation.survey", watched)
    again, ran = preprocess(config)
    assert looked_at == ["broken.mp4"]  # what could not be looked at before
    assert not ran
    assert again["clips"] == summary["clips"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "gone.mp4", "caption": "x"}, "row 2 (gone.mp4): the video cannot be opened"),
        ({"video": "a.mp4", "caption": " "}, "row 2 (a.mp4): has caption ' '"),
        ({"video": "a.mp4", "caption": "x"}, "row 2 (a.mp4): repeats row 1"),
    ],
)
def test_bad_rows_stop_the_command_before_it_writes(
    manifest: Path, tmp_path: Path, row: dict[str, str], message: str
) -> None:
    bad = manifest.parent / "bad.jsonl"
    bad.write_text(json.dumps({"video": "a.mp4", "caption": "x"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ManifestError) as error:
        preprocess(config_for(bad, tmp_path / "out"))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_frame_count_the_encoder_cannot_take_stops_the_command(manifest: Path, tmp_path: Path) -> None:
    buckets = [{"num_frames": 48, "height": 32, "width": 48}]
    with pytest.raises(ConfigError, match="nearest are 45 and 49"):
        preprocess(config_for(manifest, tmp_path / "out", buckets=buckets))
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused_with_the_fields_that_differ(dataset: Path, manifest: Path) -> None:
    with pytest.raises(StaleDatasetError) as error:
        preprocess(config_for(manifest, dataset, resize={"mode": "pad"}, frames={"short": "drop"}))
    assert error.value.differences == {
        "frames.short": ("interpolate", "drop"),
        "resize.mode": ("cover_crop", "pad"),
    }


def test_a_folder_that_is_no_dataset_is_left_alone(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StaleDatasetError, match="not a latent dataset"):
        preprocess(config_for(manifest, tmp_path))
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_short_clips_are_dropped_or_fatal_as_asked(manifest: Path, tmp_path: Path) -> None:
    summary, _ = preprocess(config_for(manifest, tmp_path / "drop", frames={"short": "drop"}))
    assert summary["reasons"]["too_short"] == 1
    assert summary["quarantine_rate"] == round(1 / 6, 4)  # the broken one: dropping short ones was asked for
    with pytest.raises(RunError, match=r"short\.mp4"):
        preprocess(config_for(manifest, tmp_path / "error", frames={"short": "error"}))


def test_disk_trouble_stops_the_run_and_the_next_one_finishes_it(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ShardWriter.add
    calls = 0

    def full_once(self: ShardWriter, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise OSError(28, "No space left on device")
        add(self, *args, **kwargs)

    monkeypatch.setattr(ShardWriter, "add", full_once)
    with pytest.raises(RunError, match=r"the disk is full at .*out.*run the same command again"):
        preprocess(config_for(manifest, tmp_path / "out"))
    summary, _ = preprocess(config_for(manifest, tmp_path / "out"))
    assert (summary["kept"], summary["quarantined"]) == (5, 1)
    assert check_dataset(tmp_path / "out").clean


def test_a_file_replaced_after_it_was_listed_never_takes_the_old_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after planning; then a file changes, runs as what it is now, and the old one comes back."""
    folder = tmp_path / "videos"
    folder.mkdir()
    video = make_video(folder / "x.mp4", num_frames=12)
    make_video(folder / "y.mp4", num_frames=10)
    original = video.read_bytes()
    listed = folder / "manifest.jsonl"
    listed.write_text("".join(json.dumps({"video": n, "caption": n}) + "\n" for n in ("x.mp4", "y.mp4")))
    config = config_for(listed, tmp_path / "out")

    def die(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(graph, "run_units", die)
        with pytest.raises(KeyboardInterrupt):
            preprocess(config)
    make_video(video, num_frames=20, size=(64, 96))
    summary, _ = preprocess(config)
    assert summary["kept"] == 2
    video.write_bytes(original)
    summary, ran = preprocess(config)
    assert (summary["kept"], ran) == (2, True)
    assert check_dataset(tmp_path / "out").clean
    rows = {row["source"]: row for row in read_index(tmp_path / "out").to_pylist()}
    assert rows["x.mp4"]["bucket"] == "9x32x48"  # the landscape original, not its replacement


def test_a_file_that_vanishes_during_the_run_stops_it_and_nothing_sticks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = make_video(tmp_path / "x.mp4", num_frames=12)
    listed = tmp_path / "manifest.jsonl"
    listed.write_text(json.dumps({"video": "x.mp4", "caption": "x"}) + "\n")
    run_units = graph.run_units

    def vanish(*args: Any, **kwargs: Any) -> Any:
        video.rename(tmp_path / "elsewhere")
        return run_units(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(graph, "run_units", vanish)
        with pytest.raises(RunError, match="is gone or was replaced"):
            preprocess(config_for(listed, tmp_path / "out"))
    (tmp_path / "elsewhere").rename(video)
    summary, _ = preprocess(config_for(listed, tmp_path / "out"))
    assert (summary["kept"], summary["quarantined"]) == (1, 0)


def test_what_a_killed_first_run_left_does_not_lock_the_folder(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / ".tmp-123-abc").write_text("half a card")
    summary, _ = preprocess(config_for(manifest, tmp_path))
    assert summary["kept"] == 5


def test_an_output_that_cannot_be_a_folder_is_named(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(ConfigError, match=r"output: .*file"):
            preprocess(config_for(manifest, output))


def test_a_wrong_config_stops_early(tmp_path: Path) -> None:
    """More than half of the first rows fail: the run says so instead of quarantining everything."""
    rows = []
    for i in range(EARLY_STOP_ROWS + 50):
        (tmp_path / f"{i}.mp4").write_bytes(b"not a video %d" % i)
        rows.append({"video": f"{i}.mp4", "caption": "x"})
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunError, match=r"200 of the first 200 clips failed, 200 of them with 'open_failed'"):
        preprocess(config_for(manifest, tmp_path / "out", units={"rows": 50}))
