"""Shards: reproducible bytes, offsets that hold, and files that everyone's tools read."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import webdataset

from pipeline.commit import commit_once
from pipeline.generation import Unit, pending_units
from pipeline.shard_writer import ShardWriter, record_bytes
from schemas.codec import Tensor, tensor_from
from schemas.dataset import Dataset
from schemas.index import read_index, read_tensor
from tests.pipeline.fake import ask, finish, make_dataset, make_rows, write_unit


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset, card = make_dataset(tmp_path / "latents")
    ask(dataset, card, make_rows(tmp_path / "videos", 5))
    finish(dataset, card)
    return dataset


def test_same_input_same_shard_bytes(dataset: Dataset, tmp_path: Path) -> None:
    other, card = make_dataset(tmp_path / "other")
    ask(other, card, make_rows(tmp_path / "videos", 5))
    finish(other, card)
    ours = {p.relative_to(dataset.root): p.read_bytes() for p in dataset.root.glob("*/*/*.tar")}
    theirs = {p.relative_to(other.root): p.read_bytes() for p in other.root.glob("*/*/*.tar")}
    assert len(ours) == 6
    assert ours == theirs


def test_every_recorded_span_is_where_the_record_says(dataset: Dataset) -> None:
    checked = 0
    for unit in range(3):
        commit = dataset.commit("latents", unit)
        assert commit is not None
        assert commit.shard is not None
        data = (dataset.root / commit.shard).read_bytes()
        for sample in commit.samples:
            for record in sample.tensors.values():
                payload = data[record.offset : record.offset + record.nbytes]
                assert tensor_from(payload, dtype=record.dtype, shape=list(record.shape)).shape == (
                    3,
                    16,
                    4,
                    6,
                )
                checked += 1
    assert checked == 10


# webdataset leaves the file it reads from to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_tar_webdataset_and_safetensors_read_the_shards(dataset: Dataset) -> None:
    rows = {row["sample_id"]: row for row in read_index(dataset.root).to_pylist()}
    seen = set()
    for shard in {row["shard"] for row in rows.values()}:
        path = str(dataset.root / shard)
        listed = subprocess.run(
            ["tar", "-tf", path], capture_output=True, text=True, check=True
        ).stdout.split()
        samples = list(webdataset.WebDataset(path, shardshuffle=False, empty_check=False))
        assert len(listed) == 2 * len(samples)
        for sample in samples:
            key = sample["__key__"]
            tensors = safetensors.numpy.load(sample["latents.safetensors"])
            for name, values in tensors.items():
                assert (values == read_tensor(dataset.root, rows[key], name).data).all()
            seen.add(key)
    assert seen == rows.keys()


def test_a_second_writer_of_a_unit_gets_the_first_ones_record(dataset: Dataset, tmp_path: Path) -> None:
    _, card = make_dataset(tmp_path / "card-only")
    first = dataset.commit("latents", 0)
    assert first is not None
    unit = Unit("latents", 0, ({"key": "0" * 32, "source": "late.mp4"},))
    assert write_unit(dataset, card, unit) == first
    assert dataset.commit("latents", 0) == first


def test_a_failed_unit_leaves_nothing_behind(tmp_path: Path) -> None:
    dataset, card = make_dataset(tmp_path / "latents")
    ask(dataset, card, make_rows(tmp_path / "videos", 2))
    (unit,) = pending_units(dataset, "latents")
    with (
        pytest.raises(ZeroDivisionError),
        ShardWriter(dataset, family="latents", unit=unit.number, fingerprint="f"),
    ):
        raise ZeroDivisionError
    left = [name for _, _, names in os.walk(dataset.root / "latents") for name in names]
    assert left == []
    assert dataset.commit("latents", unit.number) is None


def test_a_unit_of_failures_commits_without_a_shard(tmp_path: Path) -> None:
    dataset, card = make_dataset(tmp_path / "latents")
    ask(dataset, card, make_rows(tmp_path / "videos", 1, start=7))
    *_, commit = finish(dataset, card)
    assert commit.shard is None
    assert [failure.reason for failure in commit.quarantined] == ["bad"]
    assert list((dataset.root / "latents").rglob("*.tar")) == []


def test_for_a_coordinator_a_shard_is_published_and_its_record_handed_over(tmp_path: Path) -> None:
    dataset, card = make_dataset(tmp_path / "latents")
    fingerprint = card.family_fingerprint("prompts")
    with ShardWriter(
        dataset, family="prompts", unit=3, fingerprint=fingerprint, committing="coordinator"
    ) as shard:
        shard.add("0" * 32, {"prompt_embeds": Tensor("F32", np.ones((5, 8), np.float32))}, meta={})
        record = shard.commit(quarantined=[], seconds={})
    assert record.shard is not None
    assert (dataset.root / record.shard).stat().st_size == record.nbytes
    assert dataset.commit("prompts", 3) is None
    assert commit_once(dataset.commit_path("prompts", 3), record_bytes(record))
    assert dataset.commit("prompts", 3) == record
