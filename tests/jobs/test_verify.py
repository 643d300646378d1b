"""`verify`: what it says and how it exits, for sound, damaged and stale datasets; `export` beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cli import main
from pipeline import dct
from pipeline.reindex import update_tables
from pipeline.shard_writer import ShardWriter
from schemas.card import read_card
from schemas.codec import from_float32
from schemas.dataset import Dataset
from schemas.index import read_index
from tests.pipeline.test_dct import waves
from tests.pipeline.test_fidelity import make_dataset


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
        f"to mend it: rm -f {record} && rm -f {dataset}/index.parquet && latentpress preprocess {config}"
        in out
    )
    assert "compared" not in out.replace("are compared with commit records", "")


def test_orphans_are_a_note(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    orphan = dataset / "latents" / "00" / f"u00000000-{'0' * 12}.tar"
    orphan.write_bytes(bytes(3000))
    assert run("verify", dataset, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert f"note: 1 files (3 kB) are of no commit, such as latents/00/{orphan.name}" in out
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
    assert sorted(os.listdir(dataset.parent / "webdataset")) == ["dataset.json", "samples-000000.tar"]
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
