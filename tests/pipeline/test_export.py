"""Exports: read by plain webdataset, safetensors, zarr and xarray, equal to the dataset to the bit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import webdataset
import xarray
import zarr
import zarr.storage

from pipeline.export import CHUNK_BYTES, new_folder, read_samples, to_webdataset, to_zarr
from schemas.card import read_card
from schemas.codec import as_float32
from schemas.dataset import Dataset
from schemas.errors import ConfigError, DatasetError, MissingExtraError
from schemas.index import read_empty_prompt, read_index
from tests.pipeline.fake import ask, finish, make_dataset, make_rows
from tests.trainer.datasets import write_dataset

CAPTION = "Ein Löwe 🦁\nschläft\u202e \x00 \"'\\ \U0010ffff"
LONG = (257, 128, 128)
"""65 latent frames of 16 KiB."""


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Six rows of five clips: one clip twice with two captions, one with the caption of a third."""
    dataset, card = make_dataset(tmp_path / "latents")
    rows = make_rows(tmp_path / "videos", 5)
    rows[0] = dataclasses.replace(rows[0], caption=CAPTION)
    copy = tmp_path / "videos" / "copy.mp4"
    copy.write_bytes(Path(rows[1].path).read_bytes())
    rows += [
        dataclasses.replace(rows[0], caption="another"),
        dataclasses.replace(rows[1], path=str(copy), source=copy.name),
    ]
    ask(dataset, card, rows)
    finish(dataset, card)
    return dataset


def exported_tars(dataset: Path, folder: Path, *, shard_bytes: int = 20_000) -> dict[str, Any]:
    with new_folder(folder) as new:
        *_, written = to_webdataset(dataset, new, shard_bytes=shard_bytes)
    facts: dict[str, Any] = json.loads((folder / "dataset.json").read_bytes())
    assert facts["samples"] == written.samples
    return facts


# webdataset leaves the file it reads from to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_plain_webdataset_and_safetensors_read_what_was_exported(dataset: Dataset, tmp_path: Path) -> None:
    facts = exported_tars(dataset.root, tmp_path / "out")
    shards = [shard["name"] for shard in facts["shards"]]
    assert shards == [f"samples-{i:06d}.tar" for i in range(len(shards))]
    assert len(shards) > 1
    read = list(webdataset.WebDataset([str(tmp_path / "out" / name) for name in shards], shardshuffle=False))
    ours = list(read_samples(dataset.root, read_card(dataset.root)))
    index = read_index(dataset.root).to_pylist()
    assert len({sample["__key__"] for sample in read}) == len(read) == len(ours) == len(index) == 7
    for sample, expected, row in zip(read, ours, index, strict=True):
        meta = json.loads(sample["json"])
        assert (meta["caption"], meta["pts_s"]) == (row["caption"], row["pts_s"])
        assert meta["scaling"] == {"rule": "factor", "factor": 0.5, "shift": 0.0, "mean": [], "std": []}
        for member, tensors in (("latents", expected.latents), ("prompt_embeds", expected.prompt)):
            values = safetensors.numpy.load(sample[f"{member}.safetensors"])
            assert values.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert values[name].dtype == tensor.data.dtype
                assert (values[name] == tensor.data).all()
    captions = [json.loads(sample["json"])["caption"] for sample in read]
    assert CAPTION in captions
    assert len(set(captions)) < len(captions)
    assert facts["scaling"] == read_card(dataset.root).scaling.model_dump(mode="json")
    empty = safetensors.numpy.load_file(tmp_path / "out" / "empty_prompt.safetensors")
    expected_empty = read_empty_prompt(dataset.root)
    assert {name: values.tobytes() for name, values in empty.items()} == {
        name: tensor.data.tobytes() for name, tensor in expected_empty.items()
    }
    assert not any((empty["prompt_embeds"] == sample.prompt["prompt_embeds"].data).all() for sample in ours)


def test_members_are_those_of_the_dataset_and_exports_are_equal(dataset: Dataset, tmp_path: Path) -> None:
    for name in ("a", "b"):
        exported_tars(dataset.root, tmp_path / name)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert a == b
    (whole,) = exported_tars(dataset.root, tmp_path / "c", shard_bytes=10**9)["shards"]
    assert whole["samples"] == 7
    row = read_index(dataset.root).to_pylist()[0]
    with (
        tarfile.open(dataset.root / row["shard"]) as ours,
        tarfile.open(tmp_path / "c" / whole["name"]) as out,
    ):
        stored = ours.extractfile(f"{row['sample_id']}.latents.safetensors")
        exported = out.extractfile("00000000.latents.safetensors")
        assert stored is not None
        assert exported is not None
        assert stored.read() == exported.read()


@pytest.mark.parametrize(
    ("store", "dtype"), [("moments", "float32"), ("mean", "bfloat16"), ("mean", "float16")]
)
def test_zarr_and_xarray_read_the_same_values(tmp_path: Path, store: Any, dtype: Any) -> None:
    dataset = write_dataset(tmp_path / "latents", shapes=[(9, 32, 48), (5, 32, 32)], store=store, dtype=dtype)
    with new_folder(tmp_path / "out") as new:
        *_, written = to_zarr(dataset, new)
    root = zarr.open_group(tmp_path / "out", mode="r")
    samples = list(read_samples(dataset, read_card(dataset)))
    assert sorted({*root} - {"empty_prompt"}) == [each.key for each in samples] == ["00000000", "00000001"]
    assert written.samples == 2
    for name, tensor in read_empty_prompt(dataset).items():
        assert np.asarray(root[f"empty_prompt/{name}"]).tobytes() == tensor.data.tobytes()
    assert dict(root.attrs)["scaling"] == read_card(dataset).scaling.model_dump(mode="json")
    for sample in samples:
        seen = xarray.open_zarr(tmp_path / "out", group=sample.key, consolidated=False)
        assert dict(root[sample.key].attrs) == json.loads(json.dumps(sample.meta))
        assert seen.attrs["caption"] == sample.meta["caption"]
        tensors = {**sample.latents, **sample.prompt}
        assert set(seen.data_vars) == set(tensors)
        for name, tensor in tensors.items():
            values = root[f"{sample.key}/{name}"][...]  # type: ignore[index]
            expected = as_float32(tensor) if tensor.dtype == "BF16" else tensor.data
            assert values.tobytes() == expected.tobytes()  # type: ignore[union-attr]
            assert (seen[name].to_numpy() == expected).all()
            assert seen[name].attrs["stored_dtype"] == tensor.dtype
        first = seen[next(iter(sample.latents))]
        assert first.dims == ("time", "channel", "height", "width")


class CountingStore(zarr.storage.LocalStore):
    """A folder that remembers which chunks were asked for."""

    chunks: list[str]

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if "/c/" in key:
            self.chunks.append(key)
        return await super().get(key, *args, **kwargs)


def test_a_window_of_a_long_clip_reads_its_chunks_only(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "latents", shapes=[LONG], store="mean")
    with new_folder(tmp_path / "out") as new:
        list(to_zarr(dataset, new))
    store = CountingStore(tmp_path / "out", read_only=True)
    store.chunks = []
    latents = zarr.open_array(store, path="00000000/latents", mode="r")
    assert latents.shape == (65, 16, 16, 16)
    assert latents.chunks == (CHUNK_BYTES // (16 * 16 * 16 * 4), 16, 16, 16) == (64, 16, 16, 16)
    window = np.asarray(latents[60:64])
    assert store.chunks == ["00000000/latents/c/0/0/0/0"]
    (sample,) = read_samples(dataset, read_card(dataset))
    assert (window == sample.latents["latents"].data[60:64]).all()
    assert len(np.asarray(latents[60:65])) == 5
    assert [key[-7:] for key in store.chunks[1:]] == ["0/0/0/0", "1/0/0/0"]


def test_a_damaged_sample_stops_an_export_and_leaves_nothing(dataset: Dataset, tmp_path: Path) -> None:
    row = read_index(dataset.root).to_pylist()[-1]
    path = dataset.root / row["shard"]
    data = bytearray(path.read_bytes())
    data[row["mean_offset"]] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=row["sample_id"]):
        exported_tars(dataset.root, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def test_only_a_new_or_empty_folder_is_written_to(dataset: Dataset, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    exported_tars(dataset.root, output)
    before = sorted(output.iterdir())
    with pytest.raises(ConfigError, match="exists already"), new_folder(output):
        pass
    assert sorted(output.iterdir()) == before
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="exists already"), new_folder(file):
        pass


_STOPPED = """
import os, signal, sys
from pathlib import Path
from pipeline.export import new_folder, to_webdataset
with new_folder(Path(sys.argv[2])) as folder:
    for written in to_webdataset(sys.argv[1], folder, shard_bytes=1):
        if written.samples == 3:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_export_is_not_taken_for_one_and_can_be_repeated(dataset: Dataset, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    killed = subprocess.run([sys.executable, "-c", _STOPPED, str(dataset.root), str(output)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    assert all(name.startswith(".out.tmp-") for name in os.listdir(output.parent))
    assert exported_tars(dataset.root, output)["samples"] == 7


def test_without_the_extra_one_sentence_names_it(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'latentpress\[zarr\]'"):
        next(to_zarr(dataset.root, tmp_path))
