"""Growth: only what changed runs, and unit boundaries never move."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import reindex
from pipeline.commit import publish
from pipeline.export import to_webdataset
from pipeline.generation import pending_units
from pipeline.outlook import Outlook
from pipeline.reindex import update_tables
from pipeline.shard_writer import ShardWriter
from schemas.check import check_dataset
from schemas.dataset import Dataset
from schemas.errors import DatasetError, ManifestError
from schemas.history import KEY, row_keys
from schemas.index import lacks_empty_prompt, read_empty_prompt, read_index, read_tensor
from schemas.sample import FailureRecord, Family
from tests.pipeline.fake import BROKEN, ask, finish, make_dataset, make_rows, write_unit


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "latents"


def shards(dataset: Dataset) -> dict[str, bytes]:
    return {str(p.relative_to(dataset.root)): p.read_bytes() for p in dataset.root.glob("*/*/*.tar")}


def live_rows(dataset: Dataset) -> list[dict[str, Any]]:
    return dataset.history().live_table().to_pylist()


def changed(outlook: Outlook) -> dict[str, int]:
    """What it counts, without what is simply there or runs."""
    quiet = ("rows", "clips", "units_unfinished", "clips_to_encode", "captions_to_encode")
    return {name: count for name, count in outlook.as_dict().items() if count and name not in quiet}


def test_the_same_rows_in_any_order_change_nothing(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 5)
    assert changed(ask(dataset, card, rows)) == {"new": 5}
    finish(dataset, card)
    assert changed(ask(dataset, card, rows[::-1])) == {}
    assert dataset.history().generations == 1
    assert [*pending_units(dataset, "latents"), *pending_units(dataset, "prompts")] == []


def test_added_rows_make_new_units_and_leave_the_old_shards_alone(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 3)
    ask(dataset, card, rows)
    finish(dataset, card)
    before = shards(dataset)
    assert changed(ask(dataset, card, make_rows(tmp_path / "videos", 6))) == {"new": 3}
    assert [unit.number for unit in pending_units(dataset, "latents")] == [2, 3]
    assert list(pending_units(dataset, "prompts")) == []  # the captions are the old ones
    finish(dataset, card)
    after = shards(dataset)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2


def test_the_empty_prompt_is_asked_for_always_and_alone(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    with pytest.raises(DatasetError, match="does not hold the empty prompt yet"):
        read_empty_prompt(root)
    rows = make_rows(tmp_path / "videos", 3)
    rows[0] = dataclasses.replace(rows[0], caption="")
    outlook = ask(dataset, card, rows)
    assert (outlook.captions_to_encode, outlook.units_unfinished) == (3, 0)
    units = pending_units(dataset, "prompts")
    found = [(unit.number, [row["caption"] for row in unit.rows]) for unit in units]
    assert found == [(0, [""]), (1, ["caption 1", "caption 2"])]
    assert (len(units), units.num_rows, units[-1], units[:1]) == (2, 3, units[1], [units[0]])
    with pytest.raises(IndexError):
        units[2]
    assert str(ask(dataset, card, rows)) == "3 rows: 4 units unfinished"
    finish(dataset, card)
    assert list(pending_units(dataset, "prompts")) == []
    assert read_index(root)["prompt_unit"].to_pylist() == [0, 1, 1]
    expected = read_index(root).to_pylist()[0]
    for name, tensor in read_empty_prompt(root).items():
        assert tensor.data.tobytes() == read_tensor(root, expected, name).data.tobytes()

    rows = make_rows(tmp_path / "videos", 4)[3:]  # grown, and no row has an empty caption any more
    ask(dataset, card, rows)
    finish(dataset, card)
    assert check_dataset(root).clean
    assert check_dataset(root).prompts == 2

    dataset.commit_path("prompts", 0).unlink()
    verdict = check_dataset(root)
    assert (verdict.unfinished, verdict.findings) == (1, [])
    outlook = ask(dataset, card, rows)
    assert (str(outlook), outlook.captions_to_encode) == ("1 row: 1 unit unfinished", 1)
    finish(dataset, card)
    assert check_dataset(root).clean


def test_a_damaged_empty_prompt_is_refused_and_found(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    ask(dataset, card, make_rows(tmp_path / "videos", 2))
    finish(dataset, card)
    commit = dataset.commit("prompts", 0)
    assert commit is not None
    assert commit.shard is not None
    data = bytearray((root / commit.shard).read_bytes())
    data[commit.samples[0].tensors["prompt_embeds"].offset] ^= 1
    (root / commit.shard).write_bytes(data)
    with pytest.raises(DatasetError, match=r"prompt_embeds is damaged"):
        read_empty_prompt(root)
    assert {finding.file for finding in check_dataset(root).findings} == {commit.shard}


def test_a_dataset_may_say_that_it_has_no_empty_prompt(root: Path, tmp_path: Path) -> None:
    """One that was imported from a cache without it."""
    dataset, card = make_dataset(root)
    ask(dataset, card, make_rows(tmp_path / "videos", 2))
    assert not lacks_empty_prompt(root)
    failure = FailureRecord(
        key=card.empty_prompt, stage="import", reason="no_empty_prompt", message="not in it", attempts=1
    )
    fingerprint = card.family_fingerprint("prompts")
    with ShardWriter(dataset, family="prompts", unit=0, fingerprint=fingerprint) as shard:
        shard.commit(quarantined=[failure], seconds={})
    finish(dataset, card)
    assert check_dataset(root).clean
    with pytest.raises(DatasetError, match="has no empty prompt: not in it"):
        read_empty_prompt(root)
    *_, written = to_webdataset(root, tmp_path, shard_bytes=1)
    assert written.samples == 2
    assert not (tmp_path / "empty_prompt.safetensors").exists()


def test_an_edited_caption_runs_the_text_encoder_alone(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 3)
    ask(dataset, card, rows)
    finish(dataset, card)
    rows[1] = dataclasses.replace(rows[1], caption="edited")
    outlook = ask(dataset, card, rows)
    assert changed(outlook) == {"captions_changed": 1}
    assert str(outlook) == "3 rows: 1 caption changed: prompts only"
    assert list(pending_units(dataset, "latents")) == []
    assert [[row["caption"] for row in unit.rows] for unit in pending_units(dataset, "prompts")] == [
        ["edited"]
    ]
    finish(dataset, card)
    assert sorted(row["caption"] for row in live_rows(dataset)) == ["caption 0", "caption 2", "edited"]


def test_a_replaced_file_is_a_new_sample(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    ask(dataset, card, rows)
    finish(dataset, card)
    Path(rows[0].path).write_bytes(b"another video")
    assert changed(ask(dataset, card, rows)) == {"files_replaced": 1}
    (unit,) = pending_units(dataset, "latents")
    assert [row["source"] for row in unit.rows] == ["0.mp4"]
    assert len(live_rows(dataset)) == 2


def test_equal_content_shares_latents_and_keeps_its_captions(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    Path(rows[1].path).write_bytes(Path(rows[0].path).read_bytes())
    ask(dataset, card, rows)
    (unit,) = pending_units(dataset, "latents")
    assert len(unit.rows) == 1
    finish(dataset, card)
    live = live_rows(dataset)
    assert len({row["sample_id"] for row in live}) == 1
    assert {row["caption"] for row in live} == {"caption 0", "caption 1"}


def test_removed_rows_leave_the_view_and_come_back_without_work(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 4)
    ask(dataset, card, rows)
    finish(dataset, card)
    outlook = ask(dataset, card, rows[:1])
    assert changed(outlook) == {"removed": 3}
    assert str(outlook) == "1 row: 3 removed: hidden, nothing rewritten"
    assert len(live_rows(dataset)) == 1
    assert changed(ask(dataset, card, rows)) == {"new": 3}
    assert list(pending_units(dataset, "latents")) == []
    assert len(live_rows(dataset)) == 4


def test_a_removed_row_does_not_run_and_gets_another_unit_when_it_comes_back(
    root: Path, tmp_path: Path
) -> None:
    """Neither its clip nor its caption: a row may be removed because it stops the run."""
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 4)
    ask(dataset, card, rows)
    ask(dataset, card, [rows[0], rows[2], rows[3]])
    units = {family: pending_units(dataset, family) for family in KEY}
    assert [row["source"] for unit in units["latents"] for row in unit.rows] == ["0.mp4", "2.mp4", "3.mp4"]
    captions = [row["caption"] for unit in units["prompts"] for row in unit.rows]
    assert captions == ["", "caption 0", "caption 2"]
    finish(dataset, card)
    assert check_dataset(root).clean
    for _ in range(2):  # kept, then hidden and back once more
        ask(dataset, card, rows)
        finish(dataset, card)
        assert read_index(root)["source"].to_pylist() == ["0.mp4", "2.mp4", "3.mp4", "1.mp4"]
        assert check_dataset(root).clean
        ask(dataset, card, rows[2:])
    (commit,) = dataset.commits("latents", [2])
    assert len(commit.samples) == 1
    assert list(dataset.commits("latents", [3])) == []


def test_a_failed_row_whose_caption_was_left_out_is_healed(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    Path(rows[1].path).write_bytes(BROKEN)
    ask(dataset, card, rows)
    for unit in pending_units(dataset, "latents"):
        write_unit(dataset, card, unit)
    ask(dataset, card, rows[:1])
    finish(dataset, card)
    ask(dataset, card, rows)
    assert [[row["caption"] for row in unit.rows] for unit in pending_units(dataset, "prompts")] == [
        ["caption 1"]
    ]
    finish(dataset, card)
    assert check_dataset(root).clean


def test_a_touched_or_annotated_row_is_noted_without_work(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    ask(dataset, card, rows)
    finish(dataset, card)
    os.utime(rows[0].path, ns=(5, 5))
    rows[1] = dataclasses.replace(rows[1], extra={"tag": "new"})
    assert changed(ask(dataset, card, rows)) == {}
    assert [*pending_units(dataset, "latents"), *pending_units(dataset, "prompts")] == []
    first, second = live_rows(dataset)
    assert first["mtime_ns"] == 5
    assert second["extra"] == '{"tag": "new"}'
    assert changed(ask(dataset, card, rows)) == {}
    assert dataset.history().generations == 2


def test_a_row_that_its_unit_left_out_gets_another_unit(root: Path, tmp_path: Path) -> None:
    """It had been removed when the unit ran; when it comes back, it runs in a unit of its own."""
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    ask(dataset, card, rows)
    ask(dataset, card, rows[1:])
    finish(dataset, card)
    assert changed(ask(dataset, card, rows)) == {"new": 1}
    (unit,) = pending_units(dataset, "latents")
    assert unit.number == 1
    assert [row["source"] for row in unit.rows] == ["0.mp4"]
    finish(dataset, card)
    assert check_dataset(root).clean


def test_a_live_row_that_its_unit_left_out_is_healed_by_the_next_plan(root: Path, tmp_path: Path) -> None:
    """Another driver, which did not ask for it, ran the unit."""
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 3)
    ask(dataset, card, rows)
    first, _ = pending_units(dataset, "latents")
    write_unit(dataset, card, dataclasses.replace(first, rows=first.rows[1:]))
    finish(dataset, card)
    assert read_index(root)["source"].to_pylist() == ["1.mp4", "2.mp4"]
    outlook = ask(dataset, card, rows)
    assert changed(outlook) == {"to_retry": 1}
    assert str(outlook) == "3 rows: 1 to retry"
    finish(dataset, card)
    assert read_index(root)["source"].to_pylist() == ["1.mp4", "2.mp4", "0.mp4"]
    assert changed(ask(dataset, card, rows)) == {}
    assert check_dataset(root).clean


def test_a_row_lost_with_its_commit_record_leaves_the_index_until_it_is_made_again(
    root: Path, tmp_path: Path
) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 4)
    ask(dataset, card, rows)
    finish(dataset, card)
    whole = read_index(root)
    dataset.commit_path("latents", 0).unlink()
    update_tables(dataset, card)
    assert read_index(root)["unit"].to_pylist() == [1, 1]
    outlook = ask(dataset, card, rows)
    assert str(outlook) == "4 rows: 1 unit unfinished"
    finish(dataset, card)
    assert read_index(root).equals(whole)


def test_tables_that_are_damaged_or_gone_are_made_again(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    ask(dataset, card, make_rows(tmp_path / "videos", 9))
    finish(dataset, card)
    whole = {path: path.read_bytes() for path in (dataset.index_path, dataset.quarantine_path)}
    update_tables(dataset, card)
    dataset.index_path.write_bytes(whole[dataset.index_path][:-9] + b"x" + whole[dataset.index_path][-8:])
    dataset.quarantine_path.unlink()
    counts = update_tables(dataset, card)
    assert (counts.kept, counts.quarantined, counts.reasons) == (8, 1, {"bad": 1})
    assert {path: path.read_bytes() for path in whole} == whole


def test_a_caption_changed_to_one_that_is_stored_runs_nothing(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 3)
    ask(dataset, card, rows)
    finish(dataset, card)
    rows[1] = dataclasses.replace(rows[1], caption="caption 2")
    outlook = ask(dataset, card, rows)
    assert str(outlook) == "3 rows: 1 caption changed to one that is stored: nothing runs"
    assert (outlook.clips_to_encode, outlook.captions_to_encode) == (0, 0)


def test_only_the_rows_that_are_retried_are_told_as_such(root: Path, tmp_path: Path) -> None:
    """Not new ones that share their unit."""
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 8)
    ask(dataset, card, rows, unit_rows=8)
    first = pending_units(dataset, "latents")[0]
    write_unit(dataset, card, dataclasses.replace(first, rows=first.rows[:6]))
    finish(dataset, card)
    said = str(ask(dataset, card, make_rows(tmp_path / "videos", 11), unit_rows=8))
    assert said == "11 rows: 3 new, 2 to retry"


def test_numbers_that_json_cannot_hold_become_null(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 1)
    rows[0] = dataclasses.replace(rows[0], extra={"score": math.nan, "all": [math.inf, 1.5], "id": 10**22})
    ask(dataset, card, rows)
    (row,) = live_rows(dataset)
    assert row["extra"] == '{"all": [null, 1.5], "id": 10000000000000000000000, "score": null}'
    assert changed(ask(dataset, card, rows)) == {}
    assert dataset.history().generations == 1


def test_paths_and_captions_of_all_rows_may_exceed_2_gib(root: Path, tmp_path: Path) -> None:
    """Where offsets have 32 bits, a column of more bytes is an error."""
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    ask(dataset, card, rows)
    finish(dataset, card)
    tables = (dataset.history().live_table(), read_index(root))
    for table in tables:
        types = {name: table.schema.field(name).type for name in ("path", "caption", "source", "extra")}
        assert set(types.values()) == {pa.large_string()}
        assert row_keys(table).type == pa.large_string()


def test_a_path_that_is_no_text_is_refused_in_a_sentence(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    folder = tmp_path / os.fsdecode(b"f\xef")
    with pytest.raises(ManifestError, match="expected Unicode text"):
        ask(dataset, card, make_rows(folder, 1))


def test_tables_written_late_hold_what_another_driver_did_meanwhile(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 4)
    ask(dataset, card, rows)
    families: tuple[Family, ...] = ("prompts", "latents")
    for family in families:
        for unit in pending_units(dataset, family):
            write_unit(dataset, card, unit)

    def late(temp: Path, path: Path) -> None:
        monkeypatch.setattr(reindex, "publish", publish)
        ask(dataset, card, rows + make_rows(tmp_path / "videos", 4, start=20))
        finish(dataset, card)
        assert read_index(root).num_rows == 8
        publish(temp, path)

    monkeypatch.setattr(reindex, "publish", late)
    assert update_tables(dataset, card).kept == 8
    assert check_dataset(root).clean


def test_tables_of_another_dataset_of_the_same_rows_are_made_again(root: Path, tmp_path: Path) -> None:
    """Both gave the same numbers to units of other rows."""
    rows = make_rows(tmp_path / "videos", 9)
    dataset, card = make_dataset(root)
    ask(dataset, card, rows)
    finish(dataset, card)
    whole = {path: path.read_bytes() for path in (dataset.index_path, dataset.quarantine_path)}
    other, _ = make_dataset(tmp_path / "other")
    ask(other, card, rows, unit_rows=3)
    finish(other, card)
    for path in whole:
        path.write_bytes((other.root / path.name).read_bytes())
    update_tables(dataset, card)
    assert {path: path.read_bytes() for path in whole} == whole


def test_a_renamed_file_runs_nothing(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    ask(dataset, card, rows)
    finish(dataset, card)
    path = Path(rows[0].path).rename(tmp_path / "renamed.mp4")
    rows[0] = dataclasses.replace(rows[0], source="renamed.mp4", path=str(path))
    outlook = ask(dataset, card, rows)
    assert str(outlook) == "2 rows: 1 moved: nothing runs"
    assert (outlook.clips_to_encode, outlook.captions_to_encode) == (0, 0)
    finish(dataset, card)
    assert sorted(read_index(root)["source"].to_pylist()) == ["1.mp4", "renamed.mp4"]


def test_a_unit_is_made_from_the_copy_that_is_still_asked_for(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    rows = make_rows(tmp_path / "videos", 2)
    Path(rows[1].path).write_bytes(Path(rows[0].path).read_bytes())
    ask(dataset, card, rows)
    ask(dataset, card, rows[:1])
    Path(rows[1].path).unlink()
    (unit,) = pending_units(dataset, "latents")
    assert [(row["source"], row["path"]) for row in unit.rows] == [("0.mp4", rows[0].path)]
    finish(dataset, card)
    assert read_index(root)["source"].to_pylist() == ["0.mp4"]
