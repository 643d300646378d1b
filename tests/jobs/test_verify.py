"""`verify`: what it says and how it exits, for sound, damaged and stale datasets; `export` beside it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cli import main
from pipeline import dct
from pipeline.reindex import update_tables
from pipeline.shard_writer import ShardWriter
from schemas.adoption import adoption_record
from schemas.card import read_card
from schemas.codec import from_float32
from schemas.dataset import Dataset
from schemas.index import read_index
from tests.pipeline.test_dct import waves
from tests.pipeline.test_fidelity import make_dataset

EXPORTED = ["dataset.json", "empty_prompt.safetensors", "samples-000000.tar"]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "clips")


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of the command."""
    monkeypatch.setattr("sys.argv", ["latentpress", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def store_latents_of(dataset: Path, frames: np.ndarray) -> None:
    """Let the only unit hold, for every sample, latents of `frames`, sealed as a worker would."""
    folder, card = Dataset(dataset), read_card(dataset)
    commit = folder.commit("latents", 0)
    assert commit is not None
    folder.commit_path("latents", 0).unlink()
    folder.index_path.unlink()
    mean = dct.encode_frames(frames)
    fingerprint = card.family_fingerprint("latents")
    with ShardWriter(folder, family="latents", unit=0, fingerprint=fingerprint) as shard:
        for sample in commit.samples:
            tensors = {"mean": mean, "logvar": np.full_like(mean, -30)}
            named = {name: from_float32(values, dtype="F32") for name, values in tensors.items()}
            shard.add(sample.key, named, meta=sample.meta)
        shard.commit(quarantined=[], seconds={})
    update_tables(folder, card)


def test_a_sound_dataset_passes_its_gate(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", dataset, "--sample", 2, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "2 of 2 samples compared with their sources" in out
    assert "difference 0 at most (gate 0.05): passed" in out
    assert ": clean\n" in out
    assert run("verify", dataset, "--sample", 99, "--json", monkeypatch=monkeypatch) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["clean"], told["findings"], told["notes"]) == (True, [], [])
    fidelity: dict[str, Any] = told["fidelity"]
    assert (fidelity["passed"], fidelity["compared"], fidelity["max_difference"]) == (True, 3, 0.0)
    psnr = sorted(sample["psnr_db"] for sample in fidelity["samples"])
    assert (fidelity["min_psnr_db"], fidelity["median_psnr_db"]) == (psnr[0], psnr[1])


def test_latents_of_other_frames_fail_the_gate_alone(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every byte agrees with every claim; only decoding again can tell."""
    store_latents_of(dataset, waves(20, 64, 96)[::2][:9])
    assert run("verify", dataset, monkeypatch=monkeypatch) == 0
    assert ": clean\n" in capsys.readouterr().out
    assert run("verify", dataset, "--sample", 9, "--json", monkeypatch=monkeypatch) == 3
    fidelity = json.loads(capsys.readouterr().out)["fidelity"]
    assert not fidelity["passed"]
    assert all(sample["difference"] > 0.05 for sample in fidelity["samples"])


def test_a_psnr_that_is_asked_for_is_a_gate(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", dataset, "--sample", 9, "--min-psnr", 25, monkeypatch=monkeypatch) == 3
    out = capsys.readouterr().out
    assert "1 past the gate" in out
    (line,) = (line for line in out.splitlines() if line.endswith("past the gate") and "noise.mp4" in line)
    assert line.split()[1] == "noise.mp4"


def test_a_gate_that_saw_nothing_is_not_passed(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in read_index(dataset).to_pylist():
        Path(row["path"]).unlink(missing_ok=True)
    assert run("verify", dataset, "--sample", 9, monkeypatch=monkeypatch) == 3
    out = capsys.readouterr().out
    assert out.count("is gone") == 3
    assert "none of 3 samples could be compared with its source: not passed" in out


def test_damage_exits_1_names_the_command_and_compares_nothing(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Dataset(dataset).commit_path("latents", 0)
    record.write_bytes(record.read_bytes().replace(b'"unit": 0', b'"unit": 1'))
    assert run("verify", dataset, "--sample", 2, monkeypatch=monkeypatch) == 1
    out = capsys.readouterr().out
    (config,) = dataset.glob("runs/*/config.toml")
    assert (
        f"to mend it: rm -f {record} && rm -f {dataset}/index.parquet && rm -f {dataset}/quarantine.parquet "
        f"&& latentpress preprocess {config} --set output={dataset}\n" in out
    )
    assert "compared" not in out.replace("are compared with commit records", "")


def test_a_copy_is_mended_and_its_original_left_alone(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = dataset.parent / "a copy"
    shutil.copytree(dataset, copy)
    (copy / "index.parquet").unlink()
    before = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    assert run("verify", copy, "--json", monkeypatch=monkeypatch) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    rerun = finding["command"].split(" && ")[-1]
    assert run(*shlex.split(rerun)[1:], monkeypatch=monkeypatch) == 0
    assert run("verify", copy, monkeypatch=monkeypatch) == 0
    assert {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == before


def test_an_unfinished_dataset_is_not_sampled_but_told_as_such(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (Dataset(dataset).commit_path("latents", 0), dataset / "index.parquet"):
        path.unlink()
    assert run("verify", dataset, "--sample", 2, monkeypatch=monkeypatch) == 1
    out = capsys.readouterr().out
    assert "1 unit not done yet; to go on: latentpress preprocess" in out
    assert "2 units, " in out  # of captions: the empty one has its own


def test_a_gate_needs_samples(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", dataset, "--min-psnr", 20, monkeypatch=monkeypatch) == 2
    assert "give --sample N with it" in capsys.readouterr().err


def test_adopted_settings_are_told_wherever_the_card_speaks(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the gate, inspect and an export; a sample of other weights can still be decoded."""
    monkeypatch.chdir(dataset.parent)
    card = read_card(dataset)
    latents = {**card.hard["latents"], "video_encoder.table_sha256": "moved"}
    want = card.model_copy(update={"hard": {**card.hard, "latents": latents}})
    record = adoption_record(dataset, have=card, want=want, generation=1)
    assert record is not None
    record[0].write_bytes(record[1])
    monkeypatch.setattr(dct, "table_digest", lambda: "moved")
    assert run("verify", dataset, "--sample", 1, "--json", monkeypatch=monkeypatch) == 0
    (note,) = json.loads(capsys.readouterr().out)["fidelity"]["notes"]
    assert "video_encoder.table_sha256" in note
    assert run("verify", dataset, "--sample", 1, monkeypatch=monkeypatch) == 0
    assert "settings of the card, and others were adopted since" in capsys.readouterr().out
    sample = read_index(dataset)["sample_id"][0].as_py()
    assert run("inspect", dataset, sample, "--json", monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [note]
    assert run("export", dataset, "out", "--format", "webdataset", monkeypatch=monkeypatch) == 0
    assert json.loads((dataset.parent / "out" / "dataset.json").read_bytes())["notes"] == [note]


def test_an_export_goes_to_a_local_folder(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    command = ("export", dataset, "s3://bucket/out", "--format", "webdataset")
    assert run(*command, monkeypatch=monkeypatch) == 2
    assert "an export is written to a local folder" in capsys.readouterr().err
    assert os.listdir(empty) == []
    assert run("export", dataset, ".", "--format", "webdataset", monkeypatch=monkeypatch) == 0
    assert sorted(os.listdir(empty)) == EXPORTED
    assert sorted(os.listdir(tmp_path)) == ["clips", "empty"]


def test_orphans_are_a_note(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    orphan = dataset / "latents" / "00" / f"u00000000-{'0' * 12}.tar"
    orphan.write_bytes(bytes(3000))
    assert run("verify", dataset, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert f"note: 1 file (3 kB) of no commit, such as latents/00/{orphan.name}" in out
    assert f"latentpress gc {dataset}" in out


def test_export_says_where_it_is_and_refuses_what_is_there(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("webdataset", "zarr"):
        output = dataset.parent / form
        command = ("export", dataset, output, "--format", form)
        assert run(*command, monkeypatch=monkeypatch) == 0
        assert capsys.readouterr().out.startswith("wrote 4 samples")
        assert run(*command, monkeypatch=monkeypatch) == 2
        assert f"{output} exists already" in capsys.readouterr().err
    assert sorted(os.listdir(dataset.parent / "webdataset")) == EXPORTED
    assert (
        run("export", dataset, dataset.parent / "x", "--format", "zarr", "--json", monkeypatch=monkeypatch)
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert (told["samples"], told["format"], told["fingerprint"]) == (
        4,
        "zarr",
        read_card(dataset).fingerprint,
    )
