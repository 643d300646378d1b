"""Samples held against their sources: exact for what was encoded, apart for everything else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import dct
from pipeline.fidelity import (
    MAX_DIFFERENCE,
    MIN_PSNR_DB,
    PSNR_CEILING_DB,
    Fidelity,
    NotCompared,
    choose_samples,
    compare,
    frame_psnr,
    latent_difference,
)
from pipeline.graph import preprocess
from schemas.card import Card, read_card
from schemas.config import (
    BucketConfig,
    ExecutorConfig,
    LimitsConfig,
    PreprocessConfig,
    SourcesConfig,
    UnitsConfig,
    VideoEncoderConfig,
)
from tests.pipeline.test_dct import noise, waves
from tests.videos import make_video


def make_dataset(folder: Path, *, store: str = "moments", dtype: str = "float32") -> Path:
    """Four clips: waves, the same backwards, noise (which the codec cannot hold), and a copy of the waves."""
    folder.mkdir()
    pictures = {"waves.mp4": waves(20, 64, 96), "noise.mp4": noise(20, 64, 96)}
    pictures["backwards.mp4"] = pictures["waves.mp4"][::-1]
    for name, frames in pictures.items():
        make_video(folder / name, pictures=list(frames), pix_fmt="yuv444p")
    (folder / "copy.mp4").write_bytes((folder / "waves.mp4").read_bytes())
    lines = [json.dumps({"video": f.name, "caption": f.stem}) for f in sorted(folder.glob("*.mp4"))]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    preprocess(
        PreprocessConfig(
            manifest=str(folder / "manifest.jsonl"),
            output=str(folder / "latents"),
            buckets=(BucketConfig(num_frames=9, height=64, width=96),),
            video_encoder=VideoEncoderConfig.model_validate({"store": store, "dtype": dtype}),
            executor=ExecutorConfig(kind="local", workers=1),
            units=UnitsConfig(rows=8),
        )
    )
    return folder / "latents"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("fidelity") / "clips")


@pytest.fixture(scope="module")
def card(dataset: Path) -> Card:
    return read_card(dataset)


def measured(dataset: Path, card: Card, rows: list[dict[str, Any]]) -> list[Fidelity]:
    results = list(compare(dataset, card, rows, limits=LimitsConfig(), sources=SourcesConfig()))
    found = [result for result in results if isinstance(result, Fidelity)]
    assert found == results
    return found


def test_what_was_encoded_agrees_to_the_bit(dataset: Path, card: Card) -> None:
    rows = choose_samples(dataset, card, 99)
    assert len(rows) == 3  # the copy is the same sample
    results = {result.source: result for result in measured(dataset, card, rows)}
    assert {result.difference for result in results.values()} == {0.0}
    hardest = results.pop("noise.mp4").psnr_db
    for easy in results.values():
        assert easy.psnr_db > 30 > hardest + 10  # only the difference says that nothing is wrong with it
    assert hardest > MIN_PSNR_DB


def test_samples_are_drawn_the_same_every_time_and_not_in_order(dataset: Path, card: Card) -> None:
    ids = [row["sample_id"] for row in choose_samples(dataset, card, 99)]
    assert [row["sample_id"] for row in choose_samples(dataset, card, 2)] == ids[:2]
    orders = set()
    for number in range(20):
        other = card.model_copy(update={"fingerprint": str(number)})
        orders.add(tuple(row["sample_id"] for row in choose_samples(dataset, other, 99)))
    assert len(orders) > 1
    assert {frozenset(order) for order in orders} == {frozenset(ids)}


def test_half_precision_and_a_posterior_draw_are_no_difference(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "clips", store="sample", dtype="bfloat16")
    card = read_card(dataset)
    results = measured(dataset, card, choose_samples(dataset, card, 9))
    assert [result.difference for result in results] == [0.0] * 3


def test_sources_that_cannot_be_compared_are_notes(dataset: Path, card: Card, tmp_path: Path) -> None:
    row = choose_samples(dataset, card, 1)[0]
    path = Path(row["path"])
    aside = tmp_path / "aside"
    os.rename(path, aside)
    try:
        gone = note(dataset, card, row, limits=LimitsConfig())
        path.write_bytes(aside.read_bytes() + b"\0")
        changed = note(dataset, card, row, limits=LimitsConfig())
        path.write_bytes(aside.read_bytes())  # another time, the same bytes
        (same,) = measured(dataset, card, [row])
        refused = note(dataset, card, row, limits=LimitsConfig(max_frames=3))
    finally:
        os.replace(aside, path)
    remote = note(dataset, card, {**row, "path": "https://example.com/a.mp4"}, limits=LimitsConfig())
    assert "nothing is fetched unless sources.schemes and sources.hosts allow it" in remote
    assert gone == f"source file {path} is gone"
    assert changed == "source file has changed since it was encoded"
    assert same.difference == 0.0
    assert refused.startswith("source cannot be decoded again: ")


def note(dataset: Path, card: Card, row: dict[str, Any], *, limits: LimitsConfig) -> str:
    (result,) = compare(dataset, card, [row], limits=limits, sources=SourcesConfig())
    assert isinstance(result, NotCompared)
    return result.note


def swapped(frames: np.ndarray) -> np.ndarray:
    """The first two pictures in each other's place."""
    return frames[[1, 0, *range(2, len(frames))]]


def other_matrix(frames: np.ndarray) -> np.ndarray:
    """RGB taken from BT.601 luma and chroma by BT.709's matrix."""
    to_601 = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    to_709 = np.array([[0.2126, 0.7152, 0.0722], [-0.1146, -0.3854, 0.5], [0.5, -0.4542, -0.0458]])
    return (frames @ (np.linalg.inv(to_709) @ to_601).T).round().clip(0, 255).astype(np.uint8)


def test_latents_of_other_frames_scale_or_colours_are_past_the_gate(card: Card) -> None:
    frames = waves(9, 64, 96)
    fresh = dct.encode_frames(frames)
    for wrong in (swapped(frames), other_matrix(frames), frames[:, :, ::-1], np.roll(frames, 1, axis=0)):
        stored = dct.encode_frames(np.ascontiguousarray(wrong))
        assert latent_difference(stored, fresh, card) > MAX_DIFFERENCE
    assert latent_difference(fresh * 1.15258426, fresh, card) > MAX_DIFFERENCE
    half = fresh.astype(np.float16).astype(np.float32)
    assert 0 < latent_difference(half, fresh, card) < MAX_DIFFERENCE / 10


def test_psnr_is_that_of_the_mean_square_error() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    other = black.copy()
    other[1] = 10
    assert frame_psnr(black, other) == [PSNR_CEILING_DB, 28.13]
