"""Verification: clean data is clean, and every kind of damage is found and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.card import Card, hard_differences, read_card, refuse_stale
from schemas.check import check_dataset
from schemas.dataset import Dataset
from schemas.errors import DatasetError, StaleDatasetError
from schemas.index import read_index, read_quarantine, read_tensor
from tests.pipeline.fake import ask, finish, make_dataset, make_rows


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset, card = make_dataset(tmp_path / "latents")
    ask(dataset, card, make_rows(tmp_path / "videos", 9), unit_rows=4)
    finish(dataset, card)
    return dataset


def test_a_finished_dataset_is_clean(dataset: Dataset) -> None:
    verdict = check_dataset(dataset.root)
    assert verdict.clean, verdict.findings
    assert (verdict.samples, verdict.prompts, verdict.quarantined, verdict.units) == (8, 3, 1, 4)
    assert read_index(dataset.root).num_rows == 8
    assert read_quarantine(dataset.root).to_pylist()[0]["source"] == "7.mp4"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_flipped_byte_of_every_file_is_found(dataset: Dataset, data: st.DataObject) -> None:
    files = sorted(p for p in dataset.root.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    original = path.read_bytes()
    flipped = bytearray(original)
    flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    try:
        try:
            found = not check_dataset(dataset.root).clean
        except DatasetError:
            found = True
        harmless = path.suffix == ".json" and _same_json(original, bytes(flipped))
        assert found or harmless or _same_tables(dataset, path, original, bytes(flipped))
    finally:
        path.write_bytes(original)


def _same_json(a: bytes, b: bytes) -> bool:
    """Another spelling of the same values: nothing a reader relies on."""
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


def _same_tables(dataset: Dataset, path: Path, a: bytes, b: bytes) -> bool:
    """Parquet bytes that no value depends on."""
    import pyarrow.parquet as pq

    if path.suffix != ".parquet":
        return False
    read = []
    for data in (a, b):
        path.write_bytes(data)
        read.append(pq.read_table(path))
    return bool(read[0].equals(read[1]))


def test_a_missing_shard_and_a_missing_unit_are_named(dataset: Dataset) -> None:
    commit = dataset.commit("latents", 1)
    assert commit is not None
    assert commit.shard is not None
    (dataset.root / commit.shard).unlink()
    dataset.commit_path("latents", 0).unlink()
    verdict = check_dataset(dataset.root)
    assert verdict.unfinished == 1
    assert [finding.file for finding in verdict.findings] == [commit.shard]
    assert not verdict.clean


def test_reading_a_damaged_tensor_names_shard_and_sample(dataset: Dataset) -> None:
    row = read_index(dataset.root).to_pylist()[0]
    path = dataset.root / row["shard"]
    data = bytearray(path.read_bytes())
    data[row["mean_offset"]] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError) as error:
        read_tensor(dataset.root, row, "mean")
    assert row["shard"] in str(error.value)
    assert row["sample_id"] in str(error.value)
    read_tensor(dataset.root, row, "logvar")


def test_a_stale_index_is_found(dataset: Dataset, tmp_path: Path) -> None:
    card = read_card(dataset.root)
    ask(dataset, card, make_rows(tmp_path / "videos", 8), unit_rows=4)
    verdict = check_dataset(dataset.root)
    assert {finding.file for finding in verdict.findings} == {"index.parquet"}


def _changed(card: Card) -> Card:
    hard = json.loads(json.dumps(card.hard))
    hard["latents"]["resize.mode"] = "pad"
    hard["prompts"]["text_encoder.name"] = "other"
    return card.model_copy(update={"hard": hard})


def test_a_different_card_is_refused_field_by_field(dataset: Dataset) -> None:
    card = read_card(dataset.root)
    refuse_stale(dataset.root, have=card, want=card)
    other = _changed(card)
    assert hard_differences(card, other) == {
        "resize.mode": ("cover_crop", "pad"),
        "text_encoder.name": ("fake", "other"),
    }
    with pytest.raises(StaleDatasetError, match=r"resize\.mode +dataset 'cover_crop', config 'pad'"):
        refuse_stale(dataset.root, have=card, want=other)


def test_no_dataset_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"it has no card\.json"):
        check_dataset(tmp_path)
