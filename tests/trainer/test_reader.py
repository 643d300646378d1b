"""The reader: windows anywhere, image latents, empty prompts, damaged samples, several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from schemas.bucket import Geometry
from schemas.card import Card
from schemas.codec import as_float32, checksum
from schemas.errors import ConfigError, DatasetError, RunError
from schemas.index import read_index
from schemas.scaling import Scaling
from schemas.train_config import LrConfig, StageConfig, TrainConfig
from tests.trainer.datasets import SHAPES, clip_tensors, prompt_tensors, write_dataset
from trainer.catalog import Catalog
from trainer.loader import Loader
from trainer.reader import SampleReader, Unreadable, check_windows
from trainer.visit import Visit


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("reader") / "latents")


@pytest.fixture(scope="module")
def catalog(dataset: Path) -> Catalog:
    return Catalog(dataset)


def numbers(catalog: Catalog) -> list[int]:
    """Clip number of each row."""
    table = read_index(catalog.dataset, columns=["sample_id", "source"])
    known = dict(zip(table["sample_id"].to_pylist(), map(int, table["source"].to_pylist()), strict=True))
    return [known[catalog.sample_id(row)] for row in range(len(catalog))]


def visit(catalog: Catalog, row: int, **changed: Any) -> Visit:
    """The whole sample, or what is asked for."""
    whole: dict[str, Any] = {"first": 0, "latent_frames": int(catalog.shapes[row, 0]), "key": f"visit/{row}"}
    return Visit(row=row, **(whole | changed))


def longest(catalog: Catalog) -> int:
    return int(catalog.shapes[:, 0].argmax())


def test_a_window_anywhere_is_that_part_of_the_payload(tmp_path: Path) -> None:
    catalog = Catalog(write_dataset(tmp_path / "latents", store="mean", scaling=Scaling(rule="none")))
    reader, row = SampleReader(catalog), longest(catalog)
    number = numbers(catalog)[row]
    stored = clip_tensors(number, SHAPES[number], store="mean", dtype="float32")["latents"].data
    for _ in range(2):  # a first visit of half a payload reads all of it, any other the window
        for first in range(len(stored)):
            for length in range(1, len(stored) - first + 1):
                segment = reader.segment(visit(catalog, row, first=first, latent_frames=length))
                assert np.array_equal(segment.latents.numpy(), stored[first : first + length])
    reader.close()


def test_a_first_visit_of_half_a_payload_checks_all_of_it_a_smaller_window_none(tmp_path: Path) -> None:
    catalog = Catalog(write_dataset(tmp_path / "latents", store="mean"))
    row = longest(catalog)
    places = catalog.places["latents"]
    flip(Path(catalog.dataset) / places.shard_names[places.shard[row]], int(places.offset[row]) + 1)
    with pytest.raises(DatasetError, match="latents has crc32"):
        SampleReader(catalog).segment(visit(catalog, row, first=2, latent_frames=3))
    reader = SampleReader(catalog)
    assert reader.segment(visit(catalog, row, first=2, latent_frames=2)).weight == 1
    with pytest.raises(DatasetError, match="latents has crc32"):  # it was not taken for checked
        reader.segment(visit(catalog, row))


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_the_posterior_is_drawn_by_the_key_alone(catalog: Catalog) -> None:
    reader, row = SampleReader(catalog), longest(catalog)
    first = reader.segment(visit(catalog, row)).latents
    other = reader.segment(visit(catalog, row, key="another")).latents
    reader.segment(visit(catalog, (row + 1) % len(catalog)))
    assert torch.equal(SampleReader(catalog).segment(visit(catalog, row)).latents, first)
    assert torch.equal(reader.segment(visit(catalog, row)).latents, first), "a buffer of another visit"
    assert not torch.equal(first, other)


def test_threads_read_what_one_reads(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer open shards than there are, so that they are closed while others read them."""
    monkeypatch.setattr("trainer.shards.MAX_OPEN_SHARDS", 1)
    catalog = Catalog(dataset)
    visits = [visit(catalog, row, key=f"{row}/{turn}") for turn in range(20) for row in range(len(catalog))]
    alone = SampleReader(catalog)
    expected = [alone.segment(each) for each in visits]
    together = SampleReader(catalog)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(together.segment, visits))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.prompt_embeds, other.prompt_embeds)
    alone.close()
    together.close()


def test_what_the_plan_decided_is_on_the_segment(catalog: Catalog) -> None:
    row = longest(catalog)
    weights = tuple(1.0 + i for i in range(int(catalog.shapes[row, 0])))
    segment = SampleReader(catalog).segment(visit(catalog, row, seconds=2.5, frame_weights=weights))
    assert (segment.key, segment.seconds, segment.weight) == (f"visit/{row}", 2.5, 1.0)
    assert segment.frame_weights is not None
    assert segment.frame_weights.tolist() == list(weights)
    assert segment.image_latents is None


def test_a_dropped_caption_is_the_empty_prompt(catalog: Catalog) -> None:
    reader = SampleReader(catalog)
    empty = as_float32(prompt_tensors(-1)["prompt_embeds"])
    for row in range(len(catalog)):
        dropped = reader.segment(visit(catalog, row, empty_prompt=True))
        kept = reader.segment(visit(catalog, row))
        assert np.array_equal(dropped.prompt_embeds.numpy(), empty)
        assert not np.array_equal(kept.prompt_embeds.numpy(), empty)
        assert torch.equal(dropped.latents, kept.latents)


def with_images(root: Path, *, apart: bool, segment_frames: int = 0) -> Catalog:
    """A catalog whose card says where image latents are; those apart are a sample's last latent frame."""
    catalog = Catalog(write_dataset(root, scaling=Scaling(rule="factor", factor=0.5)))
    told: dict[str, Any] = {"image": "apart" if apart else "first_latent", "image_scaling": "inverted"}
    if segment_frames:
        told["geometry"] = Geometry(temporal=4, spatial=8, channels=16, segment_frames=segment_frames)
    catalog.card = catalog.card.model_copy(update=told)
    for name in catalog.card.image_tensors:
        places = catalog.places[name.removeprefix("image_")]
        frame = places.shape[:, 1:].prod(1) * 4
        offsets = places.offset + (places.shape[:, 0] - 1) * frame
        sums = []
        for shard, offset, size in zip(places.shard, offsets, frame, strict=True):
            data = (root / places.shard_names[shard]).read_bytes()[offset : offset + size]
            sums.append(checksum(data))
        shape = np.concatenate([np.ones((len(catalog), 1), np.int64), places.shape[:, 1:]], axis=1)
        catalog.places[name] = type(places)(
            places.shard_names, places.shard, offsets, shape, places.dtype, pa.array(sums)
        )
    return catalog


@pytest.mark.parametrize("apart", [False, True])
def test_image_latents_are_a_draw_of_their_own(tmp_path: Path, apart: bool) -> None:
    catalog = with_images(tmp_path / "latents", apart=apart)
    reader, row = SampleReader(catalog, images=True), longest(catalog)
    number = numbers(catalog)[row]
    stored = clip_tensors(number, SHAPES[number], store="moments", dtype="float32")
    mean, logvar = (torch.from_numpy(stored[name].data)[-1 if apart else 0] for name in ("mean", "logvar"))
    draws = [reader.segment(visit(catalog, row, key=f"{i}")) for i in range(300)]
    images = [draw.image_latents for draw in draws if draw.image_latents is not None]
    assert {tuple(image.shape) for image in images} == {(1, *catalog.shapes[row, 1:].tolist())}
    noise = (torch.cat(images) * 0.5 - mean) / torch.exp(0.5 * logvar)
    of_video = torch.stack([draw.latents[0] / 0.5 for draw in draws])
    video_noise = (of_video - torch.from_numpy(stored["mean"].data)[0]) / torch.exp(
        0.5 * torch.from_numpy(stored["logvar"].data)[0]
    )
    assert len(images) == 300
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs((noise * video_noise).mean()) < 0.01, "the video's own noise would tell what is to be guessed"


def test_a_dropped_image_is_zeros_and_changes_nothing_else(tmp_path: Path) -> None:
    catalog = with_images(tmp_path / "latents", apart=True)
    reader = SampleReader(catalog, images=True)
    kept = reader.segment(visit(catalog, 0))
    dropped = reader.segment(visit(catalog, 0, drop_image=True))
    assert dropped.image_latents is not None
    assert kept.image_latents is not None
    assert dropped.image_latents.shape == kept.image_latents.shape
    assert not dropped.image_latents.any()
    assert torch.equal(dropped.latents, kept.latents)


def test_pieces_encoded_alone_begin_with_their_image(tmp_path: Path) -> None:
    catalog = with_images(tmp_path / "latents", apart=False, segment_frames=5)  # pieces of two latent frames
    reader, row = SampleReader(catalog, images=True), longest(catalog)
    number = numbers(catalog)[row]
    stored = clip_tensors(number, SHAPES[number], store="moments", dtype="float32")["mean"].data[2]
    piece = visit(catalog, row, first=2, latent_frames=2)
    images = [reader.segment(Visit(**{**vars(piece), "key": f"{i}"})).image_latents for i in range(200)]
    middle = torch.stack([image for image in images if image is not None]).mean(0)[0] * 0.5
    assert (middle - torch.from_numpy(stored)).abs().mean() < 0.15
    with pytest.raises(ValueError, match="no image latents are stored for latent frame 1"):
        reader.segment(visit(catalog, row, first=1, latent_frames=2))


def test_a_dataset_without_image_latents_is_refused(catalog: Catalog) -> None:
    with pytest.raises(ConfigError, match=r"holds no image latents.*image_latents = true"):
        SampleReader(catalog, images=True)


def card_of(catalog: Catalog, **changed: Any) -> Card:
    return catalog.card.model_copy(update=changed)


PIECES = Geometry(temporal=4, spatial=8, channels=16, segment_frames=13)
BY_PLACE = Scaling(rule="per_channel_and_frame", mean=(0.0,) * 96, std=(1.0,) * 96)


@pytest.mark.parametrize(
    ("window", "changed", "images", "refusal"),
    [
        ("slice", {"image": "first_latent"}, True, r"window = 'slice': image .* set window = 'prefix'$"),
        ("slice", {"image": "first_latent"}, False, None),
        ("prefix", {"image": "apart"}, True, None),
        ("segments", {"image": "first_latent", "geometry": PIECES}, True, None),
        ("segments", {"image": "apart", "geometry": PIECES}, True, "or 'segments' where its image latents"),
        ("slice", {"scaling": BY_PLACE}, False, "scaled by their place in the clip"),
        ("prefix", {"scaling": BY_PLACE}, False, None),
    ],
)
def test_windows_that_would_not_be_what_they_seem_are_refused(
    catalog: Catalog, window: Any, changed: dict[str, Any], images: bool, refusal: str | None
) -> None:
    stage = StageConfig(name="s", steps=1, max_s=1.0, window=window, lr=LrConfig(peak=1.0))
    card = card_of(catalog, **changed)
    if refusal is None:
        check_windows(card, stage, images=images)
    else:
        with pytest.raises(ConfigError, match=refusal):
            check_windows(card, stage, images=images)
    check_windows(card, stage.model_copy(update={"max_s": None}), images=images)


def test_ranks_that_share_packs_stop_at_the_first_unreadable_sample(
    damaged: tuple[Catalog, list[int]],
) -> None:
    catalog, rows = damaged
    config = {"stages": [{"name": "a", "steps": 9, "lr": {"peak": 1.0}}], "data": {"max_unreadable": 9}}
    for mesh in ({}, {"sp": 2}, {"tp": 2}):
        settings = TrainConfig.model_validate({"dataset": "x", "output": "r", "mesh": mesh, **config})
        with Loader(catalog, config=settings) as loader:
            if not mesh:
                loader.packs(0)
                assert set(dict(loader.unreadable.found())) == {catalog.sample_id(row) for row in rows}
                continue
            with pytest.raises(DatasetError, match=r"has crc32.*; data\.max_unreadable = 9 counts as 0"):
                loader.packs(0)


def test_samples_that_any_rank_could_not_read_are_counted_together() -> None:
    unreadable = Unreadable(2)
    assert unreadable.together([("a", "bad a"), ("b", "bad b"), ("a", "bad a")]) == 2
    with pytest.raises(RunError, match=r"3 samples cannot be read, on all ranks together, .* = 2; .*bad c"):
        unreadable.together([("a", "bad a"), ("b", "bad b"), ("a", "bad a"), ("c", "bad c")])


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Catalog, list[int]]:
    """A dataset, and the rows whose means have a wrong byte."""
    catalog = Catalog(write_dataset(tmp_path / "latents"))
    places, rows = catalog.places["mean"], [1, 3]
    for row in rows:
        flip(tmp_path / "latents" / places.shard_names[places.shard[row]], int(places.offset[row]))
    return catalog, rows


def test_unreadable_samples_weigh_nothing_and_are_named(
    damaged: tuple[Catalog, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    catalog, rows = damaged
    unreadable = Unreadable(2)
    reader = SampleReader(catalog, unreadable=unreadable)
    for _ in range(2):
        for row in range(len(catalog)):
            segment = reader.segment(visit(catalog, row))
            assert segment.weight == float(row not in rows)
            assert segment.latents.shape == tuple(catalog.shapes[row])
            assert segment.prompt_embeds.shape == tuple(catalog.prompt_shapes[row])
            assert bool(segment.latents.any()) == (row not in rows)
    assert list(unreadable.samples) == [catalog.sample_id(row) for row in rows]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"left out, {n} of at most 2" for n in (1, 2)]
    assert all(catalog.sample_id(row) in line for row, line in zip(rows, lines, strict=True))


def test_one_more_than_allowed_stops_the_run(damaged: tuple[Catalog, list[int]]) -> None:
    catalog, rows = damaged
    reader = SampleReader(catalog, unreadable=Unreadable(1))
    assert reader.segment(visit(catalog, rows[0])).weight == 0
    with pytest.raises(RunError, match=rf"2 samples .*max_unreadable = 1; .*{catalog.sample_id(rows[1])}"):
        reader.segment(visit(catalog, rows[1]))


def test_an_unreadable_sample_keeps_its_image_and_empty_prompt(tmp_path: Path) -> None:
    catalog = with_images(tmp_path / "latents", apart=True)
    places = catalog.places["image_mean"]
    flip(tmp_path / "latents" / places.shard_names[places.shard[0]], int(places.offset[0]))
    reader = SampleReader(catalog, images=True, unreadable=Unreadable(1))
    segment = reader.segment(visit(catalog, 0, empty_prompt=True))
    assert segment.weight == 0
    assert segment.image_latents is not None
    assert not segment.image_latents.any()
    assert np.array_equal(segment.prompt_embeds.numpy(), as_float32(prompt_tensors(-1)["prompt_embeds"]))
