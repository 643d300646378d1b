"""`index.parquet` and `quarantine.parquet`: made of commits and manifest rows, read by everyone else.

One index row per kept manifest row, with the absolute offset of every tensor, so that a reader needs
one `preadv` a tensor; by unit, then as the unit holds them, so what is added comes last. Both files can be
rebuilt at any time; commits stay the only truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.card import Card, read_card
from schemas.codec import Tensor, checksum, tensor_from
from schemas.dataset import Dataset
from schemas.errors import DatasetError
from schemas.history import TEXT
from schemas.sample import EMPTY_PROMPT_UNIT, Family, SampleRecord, TensorRecord, UnitCommit
from schemas.store import location
from schemas.tables import open_sealed, read_sealed

_REMEDY = "delete it and run preprocess again"

QUARANTINE_SCHEMA = pa.schema(
    [
        ("source", TEXT),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("message", TEXT),
        ("attempts", pa.int64()),
        ("sample_id", pa.string()),
        ("unit", pa.int64()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("clip", pa.int64()),
        ("caption", TEXT),
        ("path", TEXT),
    ]
)
"""One row per manifest row whose clip failed; `attempts` counts those of every unit it was tried in."""

TENSOR_FIELDS = (("offset", pa.int64()), ("nbytes", pa.int64()), ("checksum", pa.string()))


def index_schema(card: Card) -> pa.Schema:
    """Columns of `index.parquet`; the tensor columns follow what the card says is stored."""
    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("unit", pa.int64()),
            ("shard", pa.string()),
            ("dtype", pa.string()),
            ("shape", pa.list_(pa.int64())),  # T, C, H, W
            *_tensor_columns((*card.latent_tensors, *card.image_tensors)),
            ("prompt_unit", pa.int64()),
            *PROMPT_COLUMNS,
            ("caption", TEXT),
            ("caption_digest", pa.string()),
            ("num_frames", pa.int64()),
            ("height", pa.int64()),
            ("width", pa.int64()),
            ("bucket", pa.string()),
            ("source", TEXT),
            ("path", TEXT),
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
            ("extra", TEXT),
        ]
    )


def _tensor_columns(names: Iterable[str]) -> list[tuple[str, pa.DataType]]:
    return [(f"{name}_{field}", kind) for name in names for field, kind in TENSOR_FIELDS]


PROMPT_TENSORS = ("prompt_embeds", "prompt_mask")
PROMPT_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("prompt_shard", pa.string()),
    ("prompt_embeds_dtype", pa.string()),
    ("prompt_embeds_shape", pa.list_(pa.int64())),  # S, D
    *_tensor_columns(PROMPT_TENSORS),
]


def read_index(dataset: str | Path, *, columns: Sequence[str] | None = None) -> pa.Table:
    """`index.parquet`; DatasetError with what to do where there is none, or its seal does not match."""
    return _there(Dataset(dataset).index_path, dataset, lambda path: _read(path, columns))


def open_index(dataset: str | Path) -> pq.ParquetFile:
    """`index.parquet`, to be read block by block; errors as of `read_index`."""
    return _there(Dataset(dataset).index_path, dataset, lambda path: open_sealed(path, remedy=_REMEDY))


def index_rows(file: pq.ParquetFile, numbers: np.ndarray, *, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of an open index with these numbers, in their order; reads only row groups that hold one."""
    ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
    groups = np.searchsorted(ends, numbers, "right")
    rows: dict[int, dict[str, Any]] = {}
    for group in np.unique(groups).tolist():
        here = numbers[groups == group]
        table = file.read_row_group(group, columns=list(columns))
        found = table.take(here - (ends[group] - table.num_rows)).to_pylist()
        rows |= dict(zip(here.tolist(), found, strict=True))
    return [rows[number] for number in numbers.tolist()]


def read_quarantine(dataset: str | Path, *, columns: Sequence[str] | None = None) -> pa.Table:
    """`quarantine.parquet`; errors as of `read_index`."""
    return _there(Dataset(dataset).quarantine_path, dataset, lambda path: _read(path, columns))


def _read(path: Path, columns: Sequence[str] | None) -> pa.Table:
    return read_sealed(path, columns=columns, remedy=_REMEDY)


def _there(path: Path, dataset: str | Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except FileNotFoundError:
        raise DatasetError(
            f"{dataset} has no {path.name}; run `latentpress preprocess` with its config again to rebuild it"
        ) from None


def located(tensors: dict[str, TensorRecord]) -> dict[str, Any]:
    """Tensor columns of a row, from a commit record."""
    return {
        f"{name}_{field}": getattr(tensor, field)
        for name, tensor in tensors.items()
        for field, _ in TENSOR_FIELDS
    }


def prompt_columns(commit: UnitCommit, sample: SampleRecord) -> dict[str, Any]:
    """The columns of PROMPT_COLUMNS for one caption, from its commit record."""
    embeds = sample.tensors["prompt_embeds"]
    return {
        "prompt_shard": commit.shard,
        "prompt_embeds_dtype": embeds.dtype,
        "prompt_embeds_shape": list(embeds.shape),
        **located(sample.tensors),
    }


def lacks_empty_prompt(dataset: str | Path) -> bool:
    """Whether a dataset says that it has none: it was imported from a cache without."""
    commit = Dataset(dataset).commit("prompts", EMPTY_PROMPT_UNIT)
    return commit is not None and not commit.samples


def read_empty_prompt(dataset: str | Path) -> dict[str, Tensor]:
    """`prompt_embeds` [S, D] and `prompt_mask` [S] of the empty caption, which stands for a caption that is
    dropped; their checksums verified.

    DatasetError where it is damaged, not committed yet, or not to be had (`lacks_empty_prompt`).
    """
    key = read_card(dataset).empty_prompt
    commit = Dataset(dataset).commit("prompts", EMPTY_PROMPT_UNIT)
    sample = next((sample for sample in commit.samples if sample.key == key), None) if commit else None
    if commit is not None and commit.quarantined:
        raise DatasetError(f"{dataset} has no empty prompt: {commit.quarantined[0].message}")
    if commit is None or sample is None:
        raise DatasetError(
            f"{dataset} does not hold the empty prompt yet; run `latentpress preprocess` with its config "
            "again"
        )
    row = {"sample_id": key, **prompt_columns(commit, sample)}
    return {name: read_tensor(dataset, row, name) for name in PROMPT_TENSORS}


def read_tensor(dataset: str | Path, row: dict[str, Any], name: str) -> Tensor:
    """One stored tensor of an index row, its checksum verified; DatasetError names shard and sample."""
    family: Family = "prompts" if name.startswith("prompt_") else "latents"
    shard = row["prompt_shard" if family == "prompts" else "shard"]
    buffer = bytearray(row[f"{name}_nbytes"])
    try:
        with (location(dataset) / shard).open("rb") as file:
            file.seek(row[f"{name}_offset"])
            got = file.readinto(buffer)
    except OSError as error:
        raise DatasetError(f"shard {shard} cannot be read: {error}") from error
    if got != len(buffer) or checksum(buffer) != row[f"{name}_checksum"]:
        raise DatasetError(
            f"shard {shard}, sample {row['sample_id']}: {name} is damaged (checksum); "
            f"run `latentpress verify {dataset}`"
        )
    if name == "prompt_mask":
        return tensor_from(buffer, dtype="U8", shape=row["prompt_embeds_shape"][:1])
    if name == "prompt_embeds":
        return tensor_from(buffer, dtype=row["prompt_embeds_dtype"], shape=row["prompt_embeds_shape"])
    shape = [1, *row["shape"][1:]] if name.startswith("image_") else row["shape"]
    return tensor_from(buffer, dtype=row["dtype"], shape=shape)
