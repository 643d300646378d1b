"""Encoders that run out of memory, through the real job: it ends, says what changed, mixes nothing."""

from __future__ import annotations

import gc
import importlib
import json
import os
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from pipeline import foreman, ray_crew
from pipeline.graph import preprocess
from pipeline.tiling import buckets_to_tile
from pipeline.unit import UnitWorker
from schemas.card import Card, read_card
from schemas.check import check_dataset
from schemas.config import PreprocessConfig
from schemas.dataset import Dataset
from schemas.errors import RunError, StaleDatasetError
from schemas.load import check_config
from tests.pipeline.hungry import TILES, HungryText, HungryVideo, manifest_of
from tests.videos import make_video

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
LARGE, SMALL = "9x32x48", "9x48x32"
CLIP = 9 * 32 * 48
"""Pixels of a clip, of both buckets."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen clips in units of ten, of which two and one are of the other bucket."""
    folder = tmp_path_factory.mktemp("videos")
    names = [f"{i:02d}.mp4" for i in range(14)]
    for i, name in enumerate(names):
        make_video(folder / name, num_frames=9 + i, size=(32, 48) if i in (8, 9, 12) else (48, 32))
    return manifest_of(folder, names)


def config_for(manifest: Path, output: Path, **video: Any) -> PreprocessConfig:
    tree: dict[str, Any] = {
        "manifest": str(manifest),
        "output": str(output),
        "buckets": [
            {"num_frames": 9, "height": 32, "width": 48},
            {"num_frames": 9, "height": 48, "width": 32},
        ],
        "video_encoder": {"kind": "diffusers", "model": "stand-in", **video},
        "units": {"rows": 10},
        "executor": {"kind": "local", "workers": 1},
    }
    return check_config(tree, PreprocessConfig, where="test")


def stand_in(patch: pytest.MonkeyPatch, video: HungryVideo | None = None, text: Any = None) -> None:
    for module in ("graph", "encoders"):
        if video is not None:
            patch.setattr(f"pipeline.{module}.load_video_encoder", lambda config, **_: video)
        if text is not None:
            patch.setattr(f"pipeline.{module}.load_text_encoder", lambda config: text)


def settings_of_units(root: Path) -> dict[int, dict[str, set[int]]]:
    """Unit -> bucket -> batch sizes on record."""
    found: dict[int, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    dataset = Dataset(root)
    for commit in dataset.commits("latents", dataset.finished()["latents"].tolist()):
        for sample in commit.samples:
            bucket = "x".join(str(sample.meta[name]) for name in ("num_frames", "height", "width"))
            found[commit.unit][bucket].add(sample.meta["batch_size"])
    return found


def incidents(root: Path) -> list[dict[str, str]]:
    (log,) = Dataset(root).runs.glob("*/log.jsonl")
    return [fact for fact in map(json.loads, log.read_text().splitlines()) if "incident" in fact]


@pytest.mark.parametrize(
    ("room", "tiled", "fits", "late"), [(1.0, False, 1, False), (0.5, True, 2, True)], ids=["whole", "tiles"]
)
def test_a_run_that_starves_at_batch_8_4_and_2_finishes_and_says_so(
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    room: float,
    tiled: bool,
    fits: int,
    late: bool,
) -> None:
    """Room for one clip, or for half of one, which is two in tiles."""
    encoder = HungryVideo(room * CLIP, late=late)
    stand_in(monkeypatch, encoder)
    summary, _ = preprocess(config_for(manifest, tmp_path / "out"))
    assert (summary["kept"], summary["quarantined"]) == (14, 0)
    assert check_dataset(tmp_path / "out").clean

    tiling = read_card(tmp_path / "out").hard["latents"]["video_encoder.tiling"]
    assert tiling == dict.fromkeys((LARGE, SMALL), TILES if tiled else False)
    units = settings_of_units(tmp_path / "out")
    assert len(units) == 2
    assert all(sizes == {fits} for unit in units.values() for sizes in unit.values())

    told = incidents(tmp_path / "out")
    halvings = 3 - (fits == 2)
    assert [fact["incident"] for fact in told] == ["batch_halved"] * halvings
    assert summary["last_run"]["latents"]["incidents"] == {"batch_halved": halvings}
    assert told[-1]["what"].endswith(f"from now on {fits} at once")
    said = capsys.readouterr().err
    assert all(fact["what"] in said for fact in told)
    assert "latents unit 0: encoding 8 clips of 9x32x48 at once" in told[0]["what"]
    assert ("does not fit in memory as a whole: encoded in tiles" in said) == tiled

    # The trial comes first: one clip, and of the other bucket only where that did not fit.
    trial = [(1, False), (1, True)] * 2 if tiled else [(1, False)]
    assert [(clips, tiles) for clips, _, tiles in encoder.begun[: len(trial)]] == trial
    assert all(tiles == tiled for _, _, tiles in encoder.begun[len(trial) :])


def test_what_a_worker_learned_of_one_shape_leaves_smaller_ones_alone(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = HungryVideo(2.5 * CLIP, batch=3)
    stand_in(monkeypatch, encoder)
    config = config_for(manifest, tmp_path / "out")
    small = config.buckets[1].model_copy(update={"height": 32, "width": 16})
    preprocess(config.model_copy(update={"buckets": (config.buckets[0], small)}))
    units = settings_of_units(tmp_path / "out")
    assert [unit[LARGE] for unit in units.values()] == [{1}] * 2
    assert [unit["9x32x16"] for unit in units.values()] == [{3}] * 2
    assert encoder.begun.count((3, (9, 32, 48), False)) == 1  # learned once


def test_the_cards_tiling_holds_for_every_later_run(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    stand_in(monkeypatch, HungryVideo(0.5 * CLIP))
    preprocess(config_for(manifest, root))
    before = (root / "card.json").read_bytes()
    (root / "commits/00/u00000001.json").unlink()

    roomy = HungryVideo(100 * CLIP)
    stand_in(monkeypatch, roomy)
    preprocess(config_for(manifest, root))
    assert roomy.begun
    assert all(tiled for _, _, tiled in roomy.begun)
    assert (root / "card.json").read_bytes() == before
    preprocess(config_for(manifest, root, tiling="on"))
    with pytest.raises(StaleDatasetError, match=r"video_encoder\.tiling"):
        preprocess(config_for(manifest, root, tiling="off"))


def test_tiling_as_asked_needs_no_trial(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = HungryVideo(100 * CLIP)
    stand_in(monkeypatch, encoder)
    preprocess(config_for(manifest, tmp_path / "out", tiling="on"))
    assert read_card(tmp_path / "out").is_tiled(LARGE)
    assert all(tiled for _, _, tiled in encoder.begun)
    assert sum(clips for clips, _, _ in encoder.begun) == 14


def test_a_clip_that_does_not_fit_in_tiles_stops_before_anything_is_begun(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, HungryVideo(0.1 * CLIP))
    with pytest.raises(RunError, match=r"1 clip of 9x\d+x\d+ at once in tiles ran out.*a smaller bucket"):
        preprocess(config_for(manifest, tmp_path / "out"))
    assert not (tmp_path / "out" / "card.json").exists()


def test_one_clip_that_no_longer_fits_is_retried_and_then_stops_the_run_with_what_to_do(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crowded(HungryVideo):
        """Others take the memory once the trial is over."""

        def buffer(self, num_clips: int, shape: tuple[int, int, int]) -> Any:
            if len(self.begun) == 1:
                self.room = 0.0
            return super().buffer(num_clips, shape)

    monkeypatch.setattr(foreman.Foreman.__init__, "__kwdefaults__", {"where": "", "backoff_s": 0.0})
    encoder = Crowded(CLIP, batch=2)
    stand_in(monkeypatch, encoder)
    config = config_for(manifest, tmp_path / "out")
    with pytest.raises(RunError) as stop:
        preprocess(config)
    sentence = str(stop.value)
    assert "latents unit 0 failed: encoding 1 clip of 9x32x48 at once ran out of memory" in sentence
    for advice in ("tiling = 'on' in a new dataset", "more free memory", "a smaller bucket", "bfloat16"):
        assert advice in sentence
    assert "executor.workers, limits.memory_bytes" not in sentence  # the advice of other failures
    tried = [clips for clips, _, _ in encoder.begun[1:]]
    assert tried == [2, *[1] * (foreman.RETRIES + 1)]
    told = [fact["incident"] for fact in incidents(tmp_path / "out")]
    assert told == ["batch_halved", *["retried"] * foreman.RETRIES]

    stand_in(monkeypatch, HungryVideo(100 * CLIP))
    summary, _ = preprocess(config)
    assert summary["kept"] == 14


def test_captions_are_halved_likewise(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = HungryText(room=2)
    stand_in(monkeypatch, HungryVideo(100 * CLIP), text)
    summary, _ = preprocess(config_for(manifest, tmp_path / "out"))
    assert summary["last_run"]["prompts"]["incidents"] == {"batch_halved": 2}
    assert [size for size in text.begun if size > 2] == [8, 4]
    assert check_dataset(tmp_path / "out").clean


def test_the_text_encoder_is_gone_before_the_video_encoder_is_loaded(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[weakref.ref[HungryText]] = []
    alive: list[bool] = []

    class Watched(HungryVideo):
        def load(self) -> None:
            alive.append(texts[-1]() is not None)

    def text(config: Any) -> HungryText:
        encoder = HungryText(8)
        texts.append(weakref.ref(encoder))
        return encoder

    stand_in(monkeypatch, Watched(100 * CLIP))
    monkeypatch.setattr("pipeline.encoders.load_text_encoder", text)
    preprocess(config_for(manifest, tmp_path / "out", tiling="off"))
    assert (len(texts), alive) == (1, [False])

    del texts[:], alive[:]
    config = config_for(manifest, tmp_path / "together", tiling="off")
    executor = config.executor.model_copy(update={"together": True})
    summary, _ = preprocess(config.model_copy(update={"executor": executor}))
    assert (len(texts), alive) == (1, [True])
    assert (summary["last_run"]["prompts"]["clips"], summary["last_run"]["latents"]["clips"]) == (15, 14)
    shards = [
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*.tar")}
        for root in (tmp_path / "out", tmp_path / "together")
    ]
    assert shards[0] == shards[1]


def test_an_idle_encoder_is_dropped_before_a_batch_is_halved(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[weakref.ref[HungryText]] = []

    class Beside(HungryVideo):
        """Has room for 8 clips only without the text encoder."""

        def begin(self, frames: Any, *, tiled: bool = False) -> Any:
            gc.collect()
            self.room = (1 if texts[-1]() is not None else 8) * CLIP
            return super().begin(frames, tiled=tiled)

    def text(config: Any) -> HungryText:
        encoder = HungryText(8)
        texts.append(weakref.ref(encoder))
        return encoder

    encoder = Beside(CLIP)
    stand_in(monkeypatch, encoder)
    monkeypatch.setattr("pipeline.encoders.load_text_encoder", text)
    config = config_for(manifest, tmp_path / "out", tiling="off")
    executor = config.executor.model_copy(update={"together": True})
    preprocess(config.model_copy(update={"executor": executor}))
    (fact,) = incidents(tmp_path / "out")
    assert fact["incident"] == "encoder_dropped"
    assert "the text encoder, idle, is no longer kept in memory" in fact["what"]
    assert all(
        sizes == {8} for unit in settings_of_units(tmp_path / "out").values() for sizes in unit.values()
    )


def test_an_error_that_is_not_want_of_memory_is_no_reason_to_go_on(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(HungryVideo):
        def begin(self, frames: Any, *, tiled: bool = False) -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    stand_in(monkeypatch, Broken(CLIP))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        preprocess(config_for(manifest, tmp_path / "out", tiling="off"))


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_the_trial_is_made_by_a_worker_and_its_incidents_reach_the_driver(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = os.getpid()

    def starve() -> None:
        assert os.getpid() != driver
        encoders = importlib.import_module("pipeline.encoders")
        setattr(encoders, "load_video_encoder", lambda config, **_: HungryVideo(0.5 * CLIP))  # noqa: B010

    class Starving(UnitWorker):
        def __init__(self, *arguments: Any) -> None:
            starve()
            super().__init__(*arguments)

    def trial(config: PreprocessConfig, want: Card) -> list[str]:
        starve()
        return buckets_to_tile(config, want)

    stand_in(monkeypatch, HungryVideo(0.0))
    monkeypatch.setattr(ray_crew, "UnitWorker", Starving)
    monkeypatch.setattr("pipeline.tiling.buckets_to_tile", trial)
    config = config_for(manifest, tmp_path / "out")
    executor = config.executor.model_copy(update={"kind": "ray"})
    summary, _ = preprocess(config.model_copy(update={"executor": executor}))
    assert (summary["kept"], summary["quarantined"]) == (14, 0)
    assert read_card(tmp_path / "out").is_tiled(LARGE)
    assert all(
        sizes == {2} for unit in settings_of_units(tmp_path / "out").values() for sizes in unit.values()
    )
    told = incidents(tmp_path / "out")
    assert [fact["incident"] for fact in told] == ["batch_halved"] * 2
    assert told[0]["what"] in capsys.readouterr().err
