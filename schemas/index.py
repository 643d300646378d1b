"""`index.parquet` and `quarantine.parquet`: built from commits and manifest rows, read by everyone else.

One index row per kept manifest row, with the absolute offset of every tensor, so that a reader needs
one `preadv` a tensor. Both files can be rebuilt at any time; commits stay the only truth.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.bucket import video_tokens
from schemas.card import Card
from schemas.codec import Tensor, checksum, tensor_from
from schemas.dataset import Dataset, GenerationRow, planned_units
from schemas.errors import DatasetError
from schemas.sample import FailureRecord, Family, SampleRecord, TensorRecord, UnitCommit

QUARANTINE_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("attempts", pa.int64()),
        ("sample_id", pa.string()),
        ("unit", pa.int64()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("clip", pa.int64()),
        ("caption", pa.string()),
    ]
)
"""One row per manifest row whose clip failed."""

_TENSOR_FIELDS = (("offset", pa.int64()), ("nbytes", pa.int64()), ("checksum", pa.string()))


def index_schema(card: Card) -> pa.Schema:
    """Columns of `index.parquet`; the tensor columns follow what the card says is stored."""
    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("unit", pa.int64()),
            ("shard", pa.string()),
            ("dtype", pa.string()),
            ("shape", pa.list_(pa.int64())),  # T, C, H, W
            *_tensor_columns(card.latent_tensors),
            ("prompt_unit", pa.int64()),
            ("prompt_shard", pa.string()),
            ("prompt_embeds_dtype", pa.string()),
            ("prompt_embeds_shape", pa.list_(pa.int64())),  # S, D
            *_tensor_columns(("prompt_embeds", "prompt_mask")),
            ("caption", pa.string()),
            ("caption_digest", pa.string()),
            ("num_frames", pa.int64()),
            ("height", pa.int64()),
            ("width", pa.int64()),
            ("bucket", pa.string()),
            ("source", pa.string()),
            ("path", pa.string()),
            ("source_digest", pa.string()),
            ("start_s", pa.float64()),
            ("end_s", pa.float64()),
            ("clip", pa.int64()),  # which of the clips of its row, from 0
            ("source_fps", pa.float64()),
            ("effective_fps", pa.float64()),  # frames per second of source time
            ("pts_s", pa.list_(pa.float64())),  # source time of each frame
            ("coverage", pa.float64()),
            ("num_interpolated", pa.int64()),
            ("num_duplicated", pa.int64()),
            ("num_repaired", pa.int64()),
            ("frame_weights", pa.list_(pa.float32())),
            ("num_tokens", pa.int64()),  # video tokens at a 2 x 2 patch
            ("extra", pa.string()),
        ]
    )


def _tensor_columns(names: Iterable[str]) -> list[tuple[str, pa.DataType]]:
    return [(f"{name}_{field}", kind) for name in names for field, kind in _TENSOR_FIELDS]


def build_tables(dataset: Dataset, card: Card) -> tuple[pa.Table, pa.Table]:
    """(index, quarantine) of everything committed and still asked for."""
    rows = dataset.live_rows()
    latents, failures = _by_key(dataset.commits("latents", planned_units(rows, "latents")))
    prompts, _ = _by_key(dataset.commits("prompts", planned_units(rows, "prompts")))
    kept, failed = [], []
    for row in rows:
        sample, prompt = latents.get(row["sample_id"]), prompts.get(row["caption_digest"])
        if sample and prompt:
            kept.append(_index_row(row, sample, prompt, card))
        elif row["sample_id"] in failures:
            failed.append(_failure_row(row, failures[row["sample_id"]]))
    return (
        pa.Table.from_pylist(kept, schema=index_schema(card)),
        pa.Table.from_pylist(failed, schema=QUARANTINE_SCHEMA),
    )


def parquet_bytes(table: pa.Table) -> memoryview:
    """A table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return memoryview(sink.getvalue())


Located = tuple[UnitCommit, SampleRecord]


def _by_key(commits: Iterable[UnitCommit]) -> tuple[dict[str, Located], dict[str, FailureRecord]]:
    kept: dict[str, Located] = {}
    failed: dict[str, FailureRecord] = {}
    for commit in commits:
        for sample in commit.samples:
            kept.setdefault(sample.key, (commit, sample))
        for failure in commit.quarantined:
            failed.setdefault(failure.key, failure)
    return kept, failed


def _index_row(row: GenerationRow, latents: Located, prompt: Located, card: Card) -> dict[str, Any]:
    commit, sample = latents
    prompt_commit, embeds = prompt
    first = sample.tensors[card.latent_tensors[0]]
    clip = sample.meta["clip"]
    num_frames, height, width = sample.meta["num_frames"], sample.meta["height"], sample.meta["width"]
    return {
        **{name: row[name] for name in ("sample_id", "caption", "caption_digest", "source", "path")},
        **{name: row[name] for name in ("source_digest", "start_s", "end_s", "clip", "extra")},
        **{name: row[name] for name in ("unit", "prompt_unit")},
        "shard": commit.shard,
        "dtype": first.dtype,
        "shape": list(first.shape),
        **_located(sample.tensors),
        "prompt_shard": prompt_commit.shard,
        "prompt_embeds_dtype": embeds.tensors["prompt_embeds"].dtype,
        "prompt_embeds_shape": list(embeds.tensors["prompt_embeds"].shape),
        **_located(embeds.tensors),
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "bucket": f"{num_frames}x{height}x{width}",
        **{
            name: clip[name] for name in ("source_fps", "effective_fps", "pts_s", "coverage", "frame_weights")
        },
        **{f"num_{name}": len(clip[name]) for name in ("interpolated", "duplicated", "repaired")},
        "num_tokens": video_tokens(first.shape),
    }


def _located(tensors: dict[str, TensorRecord]) -> dict[str, Any]:
    return {
        f"{name}_{field}": getattr(tensor, field)
        for name, tensor in tensors.items()
        for field, _ in _TENSOR_FIELDS
    }


def _failure_row(row: GenerationRow, failure: FailureRecord) -> dict[str, Any]:
    return {
        **{
            name: row[name] for name in ("source", "sample_id", "unit", "start_s", "end_s", "clip", "caption")
        },
        **{name: getattr(failure, name) for name in ("stage", "reason", "message", "attempts")},
    }


def read_index(dataset: str | Path) -> pa.Table:
    """`index.parquet`; DatasetError with what to do where there is none."""
    return _read_table(Dataset(dataset).index_path, dataset)


def read_quarantine(dataset: str | Path) -> pa.Table:
    """`quarantine.parquet`."""
    return _read_table(Dataset(dataset).quarantine_path, dataset)


def _read_table(path: Path, dataset: str | Path) -> pa.Table:
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise DatasetError(
            f"{dataset} has no {path.name}; run `latentpress preprocess` with its config again to rebuild it"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} cannot be read: {error}; delete it and run preprocess again") from error


def read_tensor(dataset: str | Path, row: dict[str, Any], name: str) -> Tensor:
    """One stored tensor of an index row, its checksum verified; DatasetError names shard and sample."""
    family: Family = "prompts" if name.startswith("prompt_") else "latents"
    shard = row["prompt_shard" if family == "prompts" else "shard"]
    buffer = bytearray(row[f"{name}_nbytes"])
    try:
        fd = os.open(Path(dataset) / shard, os.O_RDONLY)
        try:
            got = os.preadv(fd, [buffer], row[f"{name}_offset"])
        finally:
            os.close(fd)
    except OSError as error:
        raise DatasetError(f"shard {shard} cannot be read: {error.strerror}") from error
    if got != len(buffer) or checksum(buffer) != row[f"{name}_checksum"]:
        raise DatasetError(
            f"shard {shard}, sample {row['sample_id']}: {name} is damaged (checksum); "
            f"run `latentpress verify {dataset}`"
        )
    if name == "prompt_mask":
        return tensor_from(buffer, dtype="U8", shape=row["prompt_embeds_shape"][:1])
    if name == "prompt_embeds":
        return tensor_from(buffer, dtype=row["prompt_embeds_dtype"], shape=row["prompt_embeds_shape"])
    return tensor_from(buffer, dtype=row["dtype"], shape=row["shape"])
