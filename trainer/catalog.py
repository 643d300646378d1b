"""The catalog: a dataset's card and index in, checked columns out as plain arrays, one entry per sample.

What can be wrong with an index is found here, before training starts, with the name of the first
sample concerned. Rows are ordered shard by shard, whatever order the index file has. Captions are dropped:
they are the bulk of an index and no step needs them. Other columns of the manifest and frame weights are read
when a stage asks for them, at the price of opening the index again.

T latent frames, C channels, H, W latent pixels, S prompt tokens, D prompt width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.bucket import PATCH
from schemas.card import read_card
from schemas.codec import DTYPES
from schemas.errors import ConfigError, DatasetError
from schemas.index import lacks_empty_prompt, read_empty_prompt, read_index
from schemas.windows import latents_of
from trainer.order import hash_strings

_FLOATS = ("F32", "F16", "BF16")
_TENSOR_FIELDS = ("offset", "nbytes", "checksum")
_KEYS = ("shard", "sample_id", "caption_digest")
"""Order rows, and tell them apart."""


@dataclass(frozen=True)
class Places:
    """Where one tensor of every sample lies, and what it is."""

    shard_names: list[str]
    """Distinct shards, relative to the dataset."""
    shard: np.ndarray
    """[n] position in `shard_names`."""
    offset: np.ndarray
    """[n] bytes from the start of the shard."""
    shape: np.ndarray
    """[n, 4] T, C, H, W (T = 1 for a first frame's own tensors) or [n, 2] S, D."""
    dtype: str
    """safetensors tag, the same for all samples."""
    checksum: pa.Array


class Catalog:
    """All samples of a dataset; arrays are indexed by row."""

    def __init__(self, dataset: str | Path) -> None:
        """`dataset` is a folder or a URL, see `schemas.store.location`."""
        self.dataset = dataset
        self.card = read_card(dataset)
        self._table = self._read()
        for name in self._table.column_names:
            self._require(self._column(name).is_valid().to_numpy(False), f"a value of {name}")
        self.places = {
            name: self._places(name, shard="shard", shape="shape", dtype="dtype", rank=4)
            for name in self.card.latent_tensors
        }
        for name in self.card.image_tensors:
            self.places[name] = self._places(
                name, shard="shard", shape="shape", dtype="dtype", rank=4, first=True
            )
        self.places["prompt_embeds"] = self._places(
            "prompt_embeds",
            shard="prompt_shard",
            shape="prompt_embeds_shape",
            dtype="prompt_embeds_dtype",
            rank=2,
        )
        latents = self.places[self.card.latent_tensors[0]]
        self.shapes = latents.shape
        """[n, 4] T, C, H, W."""
        self.prompt_shapes = self.places["prompt_embeds"].shape
        """[n, 2] S, D."""
        self.shards = latents.shard
        """[n] number of the shard of a sample's latents; ascending."""
        buckets = self._column("bucket").dictionary_encode()
        self.bucket_names: list[str] = buckets.dictionary.to_pylist()
        self.buckets: np.ndarray = buckets.indices.to_numpy()
        """[n] position in `bucket_names`."""
        self.clip_hashes = hash_strings(self._column("sample_id"))
        """[n] uint64, equal for rows of one clip, which are neighbours and differ in caption."""
        pts = self._column("pts_s")
        self.pts_s: np.ndarray = pts.flatten().to_numpy(zero_copy_only=False)
        """Times of all samples' frames, one sample after the other, in source seconds."""
        self.pts_offsets = np.concatenate([[0], np.cumsum(pts.value_lengths().to_numpy())])
        """[n + 1]: sample i's times are pts_s[pts_offsets[i]:pts_offsets[i + 1]]."""
        self.fps: np.ndarray = self._column("effective_fps").to_numpy()
        """[n] frames per second of source time."""
        self._check()

    def __len__(self) -> int:
        return len(self.shapes)

    def sample_id(self, row: int) -> str:
        return str(self._column("sample_id")[row].as_py())

    def caption_digest(self, row: int) -> str:
        return str(self._column("caption_digest")[row].as_py())

    @cached_property
    def row_hashes(self) -> np.ndarray:
        """[n] uint64 of clip and caption."""
        # Not the plain xor, which would be the same for two clips that have each other's captions.
        return self.clip_hashes * np.uint64(3) ^ hash_strings(self._column("caption_digest"))

    @cached_property
    def source_hashes(self) -> np.ndarray:
        """[n] uint64 of the content of the file that a sample is from."""
        return hash_strings(self._column("source_digest"))

    @cached_property
    def empty_prompt_tokens(self) -> int:
        """Tokens of the empty prompt; ConfigError where the dataset has none."""
        if lacks_empty_prompt(self.dataset):
            raise ConfigError(
                f"data.caption_dropout needs the empty prompt, and {self.dataset} was imported from a cache "
                "without one; set it to 0"
            )
        return read_empty_prompt(self.dataset)["prompt_embeds"].shape[0]

    def extra(self) -> pa.Array:
        """[n] other columns of each sample's manifest row, as JSON, or empty; read anew each time."""
        return pc.fill_null(self._read_again("extra"), "")

    def frame_weights(self) -> np.ndarray:
        """float32, one for each of `pts_s`, or DatasetError where a sample has none; read anew each time."""
        weights = self._read_again("frame_weights")
        has = weights.is_valid().to_numpy(False) & (
            pc.fill_null(weights.value_lengths(), 0).to_numpy() == np.diff(self.pts_offsets)
        )
        self._require(has, "frame_weights for loss.keyframe_lambda (imported latents have none)")
        return weights.flatten().to_numpy(zero_copy_only=False)

    def _read(self) -> pa.Table:
        columns = [*_KEYS, "source_digest", "bucket", "num_frames", "effective_fps"]
        columns += ["pts_s", "shape", "dtype"]
        columns += ["prompt_shard", "prompt_embeds_shape", "prompt_embeds_dtype"]
        for name in (*self.card.latent_tensors, *self.card.image_tensors, "prompt_embeds"):
            columns += [f"{name}_{field}" for field in _TENSOR_FIELDS]
        table = read_index(self.dataset)
        if missing := sorted(set(columns) - set(table.column_names)):
            raise DatasetError(
                f"index of {self.dataset} has no column {', '.join(missing)}; "
                "run `latentpress preprocess` with its config again, it rebuilds the index"
            )
        if not table.num_rows:
            raise DatasetError(
                f"{self.dataset} holds no samples to train on; its quarantine.parquet says what failed"
            )
        self._order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in _KEYS])
        return table.select(columns).take(self._order).combine_chunks()

    def _read_again(self, column: str) -> pa.Array:
        """A column of the index for the same rows; DatasetError where it has others by now."""
        table = read_index(self.dataset, columns=[*_KEYS, column])
        if table.num_rows >= len(self):
            table = table.take(self._order)
            if all(table[name].equals(self._table[name]) for name in _KEYS):
                return table[column].combine_chunks()
        raise DatasetError(
            f"index of {self.dataset} has changed since this run began: expected its {len(self)} rows where "
            "they were; start again"
        )

    def _column(self, name: str) -> pa.Array:
        return self._table[name].chunk(0)

    def _places(
        self, name: str, *, shard: str, shape: str, dtype: str, rank: int, first: bool = False
    ) -> Places:
        """`first`: of what is stored of the first frame alone, so with T = 1."""
        shards = self._column(shard).dictionary_encode()
        shapes = self._column(shape)
        self._require(shapes.value_lengths().to_numpy() == rank, f"a {shape} of {rank} numbers")
        dims = shapes.flatten().to_numpy().reshape(-1, rank)
        self._require((dims > 0).all(1), f"a positive {shape}")
        if first:
            dims = np.column_stack([np.ones(len(dims), dims.dtype), dims[:, 1:]])
        tags = self._column(dtype).to_numpy(False)
        tag = str(tags[0])
        if tag not in _FLOATS:
            raise DatasetError(f"index of {self.dataset}: expected {dtype} in {_FLOATS}, found {tag!r}")
        self._require(tags == tag, f"{dtype} {tag} as in the first sample")
        nbytes = self._column(f"{name}_nbytes").to_numpy()
        self._require(nbytes == dims.prod(1) * DTYPES[tag].itemsize, f"{name}_nbytes to agree with {shape}")
        return Places(
            shard_names=shards.dictionary.to_pylist(),
            shard=shards.indices.to_numpy(),
            offset=self._column(f"{name}_offset").to_numpy(),
            shape=dims,
            dtype=tag,
            checksum=self._column(f"{name}_checksum"),
        )

    def _check(self) -> None:
        geometry = self.card.geometry
        num_frames = self._column("num_frames").to_numpy()
        self._require(
            self.shapes[:, 0] == latents_of(num_frames, geometry),
            f"the latent frames of its num_frames, which are {geometry.rule}",
        )
        self._require(self.shapes[:, 1] == geometry.channels, f"{geometry.channels} latent channels")
        self._require((self.shapes[:, 2:] % PATCH == 0).all(1), f"height and width in multiples of {PATCH}")
        width = self.prompt_shapes[0, 1]
        self._require(self.prompt_shapes[:, 1] == width, f"prompt_embeds of width {width}, as the first")
        self._require(np.diff(self.pts_offsets) == num_frames, "one entry of pts_s per frame")
        finite = np.logical_and.reduceat(np.isfinite(self.pts_s), self.pts_offsets[:-1])
        self._require(finite, "finite pts_s")
        self._require(np.isfinite(self.fps) & (self.fps > 0), "a positive effective_fps")

    def _require(self, holds: np.ndarray, expected: str) -> None:
        """DatasetError naming the first row for which a condition does not hold."""
        if not holds.all():
            row = int(np.argmin(holds))
            raise DatasetError(
                f"index of {self.dataset}, sample {self.sample_id(row)} in {self._column('shard')[row]}: "
                f"expected {expected}; run `latentpress verify {self.dataset}`"
            )
