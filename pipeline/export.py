"""A dataset for other people's loaders: self-contained samples, in WebDataset shards or in Zarr arrays.

In: a dataset folder. Out: a new folder that appears under its name only when whole, so that an interrupted
export leaves nothing to be taken for one. Values are those of the dataset, bit for bit, each checked against
its checksum on the way; latents stay unscaled, and the scaling rule goes with them. The trade-off: two rows
that share latents or a caption each get a copy, which is what makes a sample self-contained.

Memory is one sample and a batch of the index.

T latent frames, C channels, H, W latent cells, S prompt tokens, D prompt width.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.adoption import adoption_notes
from schemas.card import Card, read_card
from schemas.codec import Tensor, as_float32, encode_sample
from schemas.dataset import Dataset
from schemas.errors import ConfigError, DatasetError, MissingExtraError
from schemas.index import PROMPT_TENSORS, lacks_empty_prompt, read_empty_prompt, read_tensor
from schemas.tables import open_sealed

if TYPE_CHECKING:
    import zarr

CHUNK_BYTES = 1 << 20
"""Zarr: latent frames are grouped into chunks of about this size, at least one frame each."""
_BATCH = 1024
_REMEDY = "run `latentpress preprocess` with its config again, it makes the index anew"
_TOLD = (
    *("caption", "sample_id", "caption_digest", "source", "source_digest", "start_s", "end_s", "clip"),
    *("num_frames", "height", "width", "source_fps", "effective_fps", "pts_s", "coverage", "frame_weights"),
    *("dtype", "shape"),
)
"""Columns of the index that mean something outside of the dataset."""
_DIMENSIONS = {
    **dict.fromkeys(("mean", "logvar", "latents"), ("time", "channel", "height", "width")),
    **dict.fromkeys(
        ("image_mean", "image_logvar", "image_latents"), ("first_frame", "channel", "height", "width")
    ),
    "prompt_embeds": ("token", "embedding"),
    "prompt_mask": ("token",),
}
_SHAPES = (
    "mean, logvar, latents: [T, C, H, W]; prompt_embeds: [S, D]; prompt_mask: [S]. `mean` and `logvar` are "
    "the moments of the posterior: draw mean + exp(logvar / 2) * noise, or take the mean. Latents are "
    "unscaled: apply `scaling` to what is drawn (factor: (x - shift) * factor; per_channel: (x - mean) / std "
    "* factor, by C; per_channel_and_frame: by C and T) before a diffusion model sees it. `image` says where "
    "the encoding of a clip's first frame alone is: in the clip's first latent frame, or apart, as "
    "image_... [1, C, H, W]; with `image_scaling` inverted it is divided by the factor."
)
HOW_TO_READ = {
    "webdataset": "webdataset.WebDataset(SHARDS, shardshuffle=False), SHARDS being those in `shards`; then "
    "safetensors.torch.load(sample['latents.safetensors']), the same for 'prompt_embeds.safetensors', and "
    "json.loads(sample['json']). `empty_prompt.safetensors` is the prompt of no caption. " + _SHAPES,
    "zarr": "xarray.open_zarr(FOLDER, group='00000000', consolidated=False), or zarr.open_group(FOLDER); a "
    "group per sample, latents in chunks over time, so a window of a long clip reads its chunks only; the "
    "group `empty_prompt` is the prompt of no caption. "
    "bfloat16 values are stored as the float32 numbers they are. " + _SHAPES,
}


@dataclass(frozen=True)
class Sample:
    """One row of the index with everything that belongs to it."""

    key: str
    """Its position in the index: unique, also among rows that share content."""
    latents: dict[str, Tensor]
    prompt: dict[str, Tensor]
    meta: dict[str, Any]
    """JSON value: caption, times, source and scaling."""


@dataclass
class Written:
    """What an export holds so far."""

    samples: int = 0
    nbytes: int = 0
    """Of shards, or of values before compression."""
    shards: list[dict[str, Any]] = field(default_factory=list)


def read_samples(dataset: str | Path, card: Card) -> Iterator[Sample]:
    """Every row of the index, whole, in order; DatasetError naming shard and sample where one is damaged."""
    path, position = Dataset(dataset).index_path, 0
    try:
        index = open_sealed(path, remedy=_REMEDY)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing; {_REMEDY}") from None
    for batch in index.iter_batches(batch_size=_BATCH):
        for row in batch.to_pylist():
            yield Sample(
                key=f"{position:08d}",
                latents={
                    name: read_tensor(dataset, row, name)
                    for name in (*card.latent_tensors, *card.image_tensors)
                },
                prompt={name: read_tensor(dataset, row, name) for name in PROMPT_TENSORS},
                meta=_meta(row, card),
            )
            position += 1


def _meta(row: dict[str, Any], card: Card) -> dict[str, Any]:
    return {
        **{name: row[name] for name in _TOLD},
        "extra": json.loads(row["extra"] or "{}"),
        "scaling": card.scaling.model_dump(mode="json"),
    }


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` when the block ends well and disappears otherwise.

    ConfigError where `output` is a file or holds anything, or is no local folder.
    """
    if output.parts and re.fullmatch(r"\w{2,}:", output.parts[0]):
        raise ConfigError(f"{output}: an export is written to a local folder; copy it there afterwards")
    output = output.resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists already; name a new folder, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.tmp-", dir=output.parent) as temp:
        folder = Path(temp) / "export"
        folder.mkdir()
        yield folder
        for path in (*folder.rglob("*"), folder):  # on disk before the name says that it is whole
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        os.rename(folder, output)


def describe(dataset: str | Path, card: Card, *, form: str) -> dict[str, Any]:
    """What a reader of an export must know, as one JSON value; `notes` tells of settings adopted in place of
    those in `hard`."""
    told = card.model_dump(mode="json")
    names = ("scaling", "geometry", "image", "image_scaling", "fingerprint", "hard", "soft")
    notes = {"notes": adoption_notes(dataset)}
    return {"how_to_read": HOW_TO_READ[form], **{name: told[name] for name in names}, **notes}


# ------------------------------------------------------------------------------- webdataset


def to_webdataset(dataset: str | Path, folder: Path, *, shard_bytes: int) -> Iterator[Written]:
    """`samples-000000.tar` ..., `empty_prompt.safetensors` and `dataset.json` in `folder`; yields after every
    sample.

    A shard is closed once it holds `shard_bytes`. Each sample is `<key>.latents.safetensors`,
    `<key>.prompt_embeds.safetensors` and `<key>.json`; equal datasets give equal bytes.
    """
    card, written = read_card(dataset), Written()
    if not lacks_empty_prompt(dataset):
        (folder / "empty_prompt.safetensors").write_bytes(encode_sample(read_empty_prompt(dataset))[0])
    with contextlib.ExitStack() as shard:
        tar: tarfile.TarFile | None = None
        path = folder
        for sample in read_samples(dataset, card):
            if tar is None:
                path = folder / f"samples-{len(written.shards):06d}.tar"
                tar = shard.enter_context(tarfile.open(path, "w", format=tarfile.USTAR_FORMAT))
                written.shards.append({"name": path.name, "samples": 0})
            start = tar.offset
            _add(tar, f"{sample.key}.latents.safetensors", encode_sample(sample.latents)[0])
            _add(tar, f"{sample.key}.prompt_embeds.safetensors", encode_sample(sample.prompt)[0])
            _add(tar, f"{sample.key}.json", _json(sample.meta))
            written.samples += 1
            written.nbytes += tar.offset - start
            written.shards[-1]["samples"] += 1
            if tar.offset >= shard_bytes:
                shard.close()
                tar = None
            yield written
    for entry in written.shards:
        with (folder / entry["name"]).open("rb") as file:
            entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {
        **describe(dataset, card, form="webdataset"),
        "samples": written.samples,
        "shards": written.shards,
    }
    (folder / "dataset.json").write_bytes(_json(facts, indent=1))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))


def _json(value: dict[str, Any], *, indent: int | None = None) -> bytes:
    return json.dumps(value, sort_keys=True, indent=indent, allow_nan=False).encode()


# ------------------------------------------------------------------------------------- zarr


def to_zarr(dataset: str | Path, folder: Path) -> Iterator[Written]:
    """A Zarr v3 hierarchy in `folder`, a group per sample and `empty_prompt`; yields after every sample.

    Latents [T, C, H, W] are chunked over time in pieces of about CHUNK_BYTES; dimensions are named, so
    that `xarray.open_zarr` reads a group. The hierarchy's own attributes are `describe`.
    """
    try:
        import zarr
    except ImportError:
        raise MissingExtraError("zarr", "zarr") from None
    card, written = read_card(dataset), Written()
    root = zarr.open_group(folder, mode="w", zarr_format=3, attributes=describe(dataset, card, form="zarr"))
    if not lacks_empty_prompt(dataset):
        _create_arrays(root.create_group("empty_prompt"), read_empty_prompt(dataset))
    for sample in read_samples(dataset, card):
        group = root.create_group(sample.key, attributes=sample.meta)
        written.nbytes += _create_arrays(group, {**sample.latents, **sample.prompt})
        written.samples += 1
        yield written


def _create_arrays(group: zarr.Group, tensors: dict[str, Tensor]) -> int:
    """The bytes of their values, before compression."""
    nbytes = 0
    for name, tensor in tensors.items():
        values = as_float32(tensor) if tensor.dtype == "BF16" else tensor.data
        frame_bytes = values.nbytes // len(values)
        length = min(len(values), max(1, CHUNK_BYTES // frame_bytes))
        array = group.create_array(
            name,
            shape=values.shape,
            chunks=(length, *values.shape[1:]),
            dtype=values.dtype,
            dimension_names=_DIMENSIONS[name],
            attributes={"stored_dtype": tensor.dtype},
        )
        array[...] = values
        nbytes += values.nbytes
    return nbytes
