"""Verification: clean data is clean, damage is found and named, and the commands given mend it."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from upath import UPath

from pipeline.retry import retry_failed
from pipeline.shard_writer import ShardWriter
from schemas.adoption import adoption_record, refuse_stale
from schemas.card import Card, card_bytes, card_path, hard_differences, read_card
from schemas.check import check_dataset
from schemas.codec import Tensor, from_float32
from schemas.dataset import Dataset
from schemas.errors import DatasetError, StaleDatasetError
from schemas.index import read_index, read_quarantine, read_tensor
from schemas.load import open_sealed_json, sealed_json
from schemas.sample import Family, UnitCommit
from schemas.tables import read_sealed, sealed_parquet
from schemas.verdict import Verdict
from tests.pipeline.fake import ask, finish, make_dataset, make_rows

Damage = Callable[[Dataset], str]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset, card = make_dataset(tmp_path / "latents")
    ask(dataset, card, make_rows(tmp_path / "videos", 9), unit_rows=4)
    finish(dataset, card)
    return dataset


def committed(dataset: Dataset, unit: int, family: Family = "latents") -> UnitCommit:
    commit = dataset.commit(family, unit)
    assert commit is not None
    return commit


def shard_of(dataset: Dataset, unit: int, family: Family = "latents") -> Path:
    name = committed(dataset, unit, family).shard
    assert name is not None
    return dataset.root / name


def test_a_finished_dataset_is_clean(dataset: Dataset) -> None:
    seen = []
    verdict = check_dataset(dataset.root, progress=lambda done, total: seen.append((done, total)))
    assert verdict.clean, verdict.findings
    assert verdict.notes == []
    assert (verdict.samples, verdict.prompts, verdict.quarantined, verdict.units) == (8, 4, 1, 5)
    assert seen == [(done, 5) for done in range(1, 6)]
    assert read_index(dataset.root).num_rows == 8
    assert read_quarantine(dataset.root).to_pylist()[0]["source"] == "7.mp4"


# ---------------------------------------------------------------- damage that preprocess can mend


def _rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a sealed record and seal it again: what no seal can know."""
    value = open_sealed_json(path.read_bytes())
    change(value)
    path.write_bytes(sealed_json(value))


def _rewrite_table(path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    table = read_sealed(path, remedy="")
    rows = change(table.to_pylist())
    path.write_bytes(sealed_parquet(pa.Table.from_pylist(rows, schema=table.schema.remove_metadata())))


def shard_missing(dataset: Dataset) -> str:
    shard_of(dataset, 1).unlink()
    return "is missing"


def shard_cut(dataset: Dataset) -> str:
    path = shard_of(dataset, 1)
    path.write_bytes(path.read_bytes()[:5000])
    return "does not hash to what its commit says (5000 bytes"


def shard_of_another_unit(dataset: Dataset) -> str:
    shard_of(dataset, 1).write_bytes(shard_of(dataset, 0).read_bytes())
    return "which its commit does not name"


def shard_padding(dataset: Dataset) -> str:
    path = shard_of(dataset, 1)
    data = bytearray(path.read_bytes())
    assert data[-1] == 0
    data[-1] = 1
    path.write_bytes(data)
    return "does not hash"


def record_missing_among_others(dataset: Dataset) -> str:
    dataset.commit_path("latents", 0).unlink()
    return "unit 0 has no commit record"


def record_torn(dataset: Dataset) -> str:
    path = dataset.commit_path("latents", 1)
    path.write_bytes(path.read_bytes()[:-100])
    return "is damaged"


def record_respelled(dataset: Dataset) -> str:
    path = dataset.commit_path("latents", 1)
    path.write_bytes(json.dumps(json.loads(path.read_bytes())).encode())
    return "is not spelled as it was written"


def record_of_other_settings(dataset: Dataset) -> str:
    _rewrite(dataset.commit_path("latents", 1), lambda value: value.update(fingerprint="0"))
    return "was made with other settings"


def record_of_another_unit(dataset: Dataset) -> str:
    dataset.commit_path("latents", 1).write_bytes(dataset.commit_path("latents", 0).read_bytes())
    return "claims to be u00000000"


def record_without_shard(dataset: Dataset) -> str:
    _rewrite(dataset.commit_path("latents", 1), lambda value: value.update(shard=None))
    return "names samples but no shard"


def record_with_a_row_twice(dataset: Dataset) -> str:
    _rewrite(dataset.commit_path("latents", 1), lambda value: value["samples"].append(value["samples"][0]))
    return "is in it 2 times"


def record_with_a_foreign_row(dataset: Dataset) -> str:
    def add(value: dict[str, Any]) -> None:
        value["quarantined"] += [{**value["quarantined"][0], "key": "f" * 32}]

    _rewrite(dataset.commit_path("latents", 1), add)
    return "was never asked of this unit"


def record_of_another_place(dataset: Dataset) -> str:
    def shift(value: dict[str, Any]) -> None:
        value["samples"][0]["tensors"]["mean"]["offset"] += 4

    _rewrite(dataset.commit_path("latents", 1), shift)
    return "mean does not match its checksum"


def record_of_other_times(dataset: Dataset) -> str:
    def shift(value: dict[str, Any]) -> None:
        value["samples"][0]["meta"]["clip"]["pts_s"][0] = 7.0

    _rewrite(dataset.commit_path("latents", 1), shift)
    return "its .json says something else"


def index_missing(dataset: Dataset) -> str:
    dataset.index_path.unlink()
    return "is missing"


def index_with_a_row_twice(dataset: Dataset) -> str:
    _rewrite_table(dataset.index_path, lambda rows: [*rows, rows[0]])
    return "no commit record gives this row"


def index_without_a_row(dataset: Dataset) -> str:
    _rewrite_table(dataset.index_path, lambda rows: rows[:-1])
    return "is not in it"


def index_of_another_place(dataset: Dataset) -> str:
    def shift(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[2]["mean_offset"] += 64
        return rows

    _rewrite_table(dataset.index_path, shift)
    return "mean_offset differ from the commit records"


def index_without_a_column(dataset: Dataset) -> str:
    table = read_index(dataset.root).drop_columns("clip")
    dataset.index_path.write_bytes(sealed_parquet(table))
    return "has other columns"


def quarantine_without_a_row(dataset: Dataset) -> str:
    _rewrite_table(dataset.quarantine_path, lambda rows: [])
    return "is not in it"


MENDABLE = (
    *(shard_missing, shard_cut, shard_of_another_unit, shard_padding),
    *(record_missing_among_others, record_torn, record_respelled, record_of_other_settings),
    *(record_of_another_unit, record_without_shard, record_with_a_row_twice, record_with_a_foreign_row),
    *(record_of_another_place, record_of_other_times),
    *(index_missing, index_with_a_row_twice, index_without_a_row, index_of_another_place),
    *(index_without_a_column, quarantine_without_a_row),
)


@pytest.mark.parametrize("damage", MENDABLE, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_mended_by_the_command_given(dataset: Dataset, damage: Damage) -> None:
    expected = damage(dataset)
    before = files(dataset)
    verdict = check_dataset(dataset.root)
    assert files(dataset) == before  # verification repairs nothing
    assert any(expected in finding.problem for finding in verdict.findings), verdict.findings
    assert not verdict.clean
    mend(dataset, verdict)
    assert check_dataset(dataset.root).clean


def files(dataset: Dataset) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in dataset.root.rglob("*") if path.is_file()}


def mend(dataset: Dataset, verdict: Verdict) -> None:
    """Run every command, with what `preprocess` does here in its place."""
    for finding in verdict.findings:
        assert finding.command is not None
        *deletions, rerun = finding.command.split(" && ")
        assert rerun == f"latentpress preprocess CONFIG --set output={dataset.root}"
        for deletion in deletions:
            subprocess.run(shlex.split(deletion), check=True)
    finish(dataset, read_card(dataset.root))


# --------------------------------------------------------------------------- damage in numbers


@pytest.mark.parametrize(
    ("values", "dtype", "problem"),
    [
        (np.full((3, 16, 4, 6), np.nan), "F32", "mean holds NaN or Inf"),
        (np.full((3, 16, 4, 6), -np.inf), "F32", "mean holds NaN or Inf"),
        (np.zeros((2, 16, 4, 6)), "F32", "the card and its bucket give F32 [3, 16, 4, 6]"),
        (np.zeros((3, 16, 4, 6)), "F16", "the card and its bucket give F32 [3, 16, 4, 6]"),
    ],
)
def test_numbers_that_a_worker_should_never_have_committed_are_found(
    dataset: Dataset, values: np.ndarray, dtype: str, problem: str
) -> None:
    card = read_card(dataset.root)
    commit = committed(dataset, 0)
    dataset.commit_path("latents", 0).unlink()
    fingerprint = card.family_fingerprint("latents")
    with ShardWriter(dataset, family="latents", unit=0, fingerprint=fingerprint) as shard:
        for sample in commit.samples:
            tensors = {
                "mean": from_float32(values, dtype=dtype),
                "logvar": from_float32(np.zeros((3, 16, 4, 6)), dtype="F32"),
            }
            shard.add(sample.key, tensors, meta=sample.meta)
        shard.commit(quarantined=[], seconds={})
    findings = check_dataset(dataset.root).findings
    assert {finding.sample for finding in findings} == {sample.key for sample in commit.samples}
    assert all(problem in finding.problem for finding in findings)
    assert {finding.file for finding in findings} == {
        shard_of(dataset, 0).relative_to(dataset.root).as_posix()
    }


def test_tensors_that_the_card_does_not_name_are_found(dataset: Dataset) -> None:
    card = read_card(dataset.root)
    commit = committed(dataset, 0, "prompts")
    dataset.commit_path("prompts", 0).unlink()
    fingerprint = card.family_fingerprint("prompts")
    with ShardWriter(dataset, family="prompts", unit=0, fingerprint=fingerprint) as shard:
        for sample in commit.samples:
            shard.add(sample.key, {"prompt_mask": Tensor("U8", np.ones(5, np.uint8))}, meta=sample.meta)
        shard.commit(quarantined=[], seconds={})
    problems = {finding.problem for finding in check_dataset(dataset.root).findings}
    assert problems == {"holds the tensors ['prompt_mask'], expected ['prompt_embeds', 'prompt_mask']"}


# ------------------------------------------------------------------------------ growth and gaps


def test_unfinished_work_is_counted_and_no_finding(dataset: Dataset, tmp_path: Path) -> None:
    ask(dataset, read_card(dataset.root), make_rows(tmp_path / "videos", 12), unit_rows=4)
    verdict = check_dataset(dataset.root)
    assert (verdict.unfinished, verdict.findings, verdict.clean) == (1, [], False)
    assert verdict.rerun == f"latentpress preprocess CONFIG --set output={dataset.root}"
    assert verdict.notes == ["index and quarantine are compared with commit records once the rest is clean"]


def test_commands_name_the_config_of_the_newest_run(dataset: Dataset) -> None:
    for run in ("20260101T000000", "20260102T000000"):
        (dataset.runs / run).mkdir(parents=True)
        (dataset.runs / run / "config.toml").touch()
    (dataset.runs / "20260103T000000").mkdir()
    assert (
        check_dataset(dataset.root).rerun
        == f"latentpress preprocess {dataset.runs}/20260102T000000/config.toml --set output={dataset.root}"
    )


def test_a_stale_index_is_found(dataset: Dataset, tmp_path: Path) -> None:
    ask(dataset, read_card(dataset.root), make_rows(tmp_path / "videos", 8), unit_rows=4)
    verdict = check_dataset(dataset.root)
    assert {finding.file for finding in verdict.findings} == {"index.parquet"}


def test_shards_of_removed_rows_are_checked_too(dataset: Dataset, tmp_path: Path) -> None:
    card = read_card(dataset.root)
    ask(dataset, card, make_rows(tmp_path / "videos", 4), unit_rows=4)
    finish(dataset, card)
    assert check_dataset(dataset.root).clean
    shard_cut(dataset)
    assert not check_dataset(dataset.root).clean


def test_a_row_that_its_committed_unit_left_out_is_found(dataset: Dataset) -> None:
    commit = committed(dataset, 1)

    def forget(value: dict[str, Any]) -> None:
        value["quarantined"] = []

    _rewrite(dataset.commit_path("latents", 1), forget)
    (finding,) = check_dataset(dataset.root).findings
    assert finding.sample == commit.quarantined[0].key
    assert finding.problem == "7.mp4 is neither kept nor quarantined"


def test_a_generation_missing_in_the_middle_is_found(dataset: Dataset, tmp_path: Path) -> None:
    card = read_card(dataset.root)
    for count in (10, 11):
        ask(dataset, card, make_rows(tmp_path / "videos", count), unit_rows=4)
        finish(dataset, card)
    assert check_dataset(dataset.root).clean
    dataset.generation_path(1).unlink()
    finding = check_dataset(dataset.root).findings[0]
    assert (finding.file, finding.command) == ("manifest/000001.parquet", None)
    assert finding.problem == "is missing, and 1 later ones are there"


def test_the_newest_generation_missing_costs_no_sound_unit_its_record(
    dataset: Dataset, tmp_path: Path
) -> None:
    card = read_card(dataset.root)
    ask(dataset, card, make_rows(tmp_path / "videos", 12), unit_rows=4)
    finish(dataset, card)
    dataset.generation_path(1).unlink()
    findings = check_dataset(dataset.root).findings
    (lost,) = (finding for finding in findings if finding.file == "commits/00/u00000003.json")
    assert lost.command is None
    assert "no manifest generation names" in lost.problem
    assert {finding.command for finding in findings if finding.file != "index.parquet"} == {None}


def test_only_what_is_asked_for_now_is_counted(dataset: Dataset, tmp_path: Path) -> None:
    card = read_card(dataset.root)
    ask(dataset, card, make_rows(tmp_path / "videos", 2), unit_rows=4)
    finish(dataset, card)
    verdict = check_dataset(dataset.root)
    assert (verdict.samples, verdict.prompts, verdict.quarantined, verdict.units) == (2, 3, 0, 5)
    assert verdict.clean


def test_damage_to_the_earlier_unit_of_a_retried_row_is_mended_in_one_round(dataset: Dataset) -> None:
    card = read_card(dataset.root)
    retry_failed(dataset, card, reasons=None)
    finish(dataset, card)
    whole = read_quarantine(dataset.root)
    assert whole["attempts"].to_pylist() == [2]
    record_torn(dataset)
    mend(dataset, check_dataset(dataset.root))
    # Made again, the old unit holds its other rows only; the first try is forgotten by record and table.
    assert check_dataset(dataset.root).clean
    assert read_quarantine(dataset.root)["attempts"].to_pylist() == [1]


# ------------------------------------------------------------------------------------ the rest


def test_a_respelled_card_is_found(dataset: Dataset) -> None:
    path = card_path(dataset.root)
    path.write_bytes(path.read_bytes().replace(b"\n", b" ", 1))
    assert card_bytes(read_card(dataset.root)) != path.read_bytes()
    assert [finding.file for finding in check_dataset(dataset.root).findings] == ["card.json"]


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


def test_settings_that_were_adopted_are_named(dataset: Dataset) -> None:
    card = read_card(dataset.root)
    prompts = {**card.hard["prompts"], "text_encoder.weights_sha256": "other"}
    want = card.model_copy(update={"hard": {**card.hard, "prompts": prompts}})
    record = adoption_record(dataset.root, have=card, want=want, generation=1)
    assert record is not None
    path, data = record
    path.write_bytes(data)
    verdict = check_dataset(dataset.root)
    assert verdict.clean
    assert "since manifest generation 1" in verdict.notes[0]
    assert "text_encoder.weights_sha256 None -> 'other'" in verdict.notes[0]
    path.write_bytes(data.replace(b"other", b"otter"))
    assert "is damaged" in check_dataset(dataset.root).findings[0].problem


def test_a_dataset_in_an_object_store_is_checked_alike(dataset: Dataset) -> None:
    root = cast(Path, UPath(f"memory:///{dataset.root.name}-checked"))
    for path, data in files(dataset).items():
        target = root / path.relative_to(dataset.root).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    verdict = check_dataset(root)
    assert verdict.clean, verdict.findings
    assert verdict.rerun == f"latentpress preprocess CONFIG --set output={root}"
    verdict.rerun = check_dataset(dataset.root).rerun
    assert verdict.as_dict() == check_dataset(dataset.root).as_dict()
    row = read_index(root).to_pylist()[0]
    assert (read_tensor(root, row, "mean").data == read_tensor(dataset.root, row, "mean").data).all()
    shard = root / row["shard"]
    shard.write_bytes(shard.read_bytes()[:-1] + b"1")
    (finding,) = check_dataset(root).findings
    assert finding.file == row["shard"]
    assert finding.command is not None
    assert f"{dataset.root.name}-checked/commits/00/u00000000.json" in finding.command
