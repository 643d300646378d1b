"""The catalog: a dataset's card and index in, checked columns out as plain arrays, one entry per sample.

What can be wrong with an index is found here, before training starts, with the name of the first
sample concerned. Rows are ordered shard by shard, whatever order the index file has. Captions, frame
weights and the like are dropped: they are the bulk of an index and no step needs them.

T latent frames, C channels, H, W latent pixels, S prompt tokens, D prompt width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from schemas.bucket import PATCH
from schemas.card import read_card
from schemas.codec import DTYPES
from schemas.errors import DatasetError
from schemas.index import read_index

_FLOATS = ("F32", "F16", "BF16")
_TENSOR_FIELDS = ("offset", "nbytes", "checksum")


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
    """[n, 4] T, C, H, W or [n, 2] S, D."""
    dtype: str
    """safetensors tag, the same for all samples."""
    checksum: pa.Array


class Catalog:
    """All samples of a dataset; arrays are indexed by row."""

    def __init__(self, dataset: Path) -> None:
        self.dataset = Path(dataset)
        self.card = read_card(self.dataset)
        self._table = self._read()
        for name in self._table.column_names:
            self._require(self._column(name).is_valid().to_numpy(False), f"a value of {name}")
        self.places = {
            name: self._places(name, shard="shard", shape="shape", dtype="dtype", rank=4)
            for name in self.card.latent_tensors
        }
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
        self.shard_sizes: np.ndarray = np.bincount(latents.shard)
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

    def digest(self) -> str:
        """Equal for equal samples in equal shards, wherever the dataset lies."""
        state = hashlib.sha256(self.card.fingerprint.encode() + self.shard_sizes.tobytes())
        for name in ("sample_id", "caption_digest"):
            state.update("\n".join(self._column(name).to_pylist()).encode())
        return state.hexdigest()

    def _read(self) -> pa.Table:
        columns = ["sample_id", "caption_digest", "num_frames", "effective_fps", "pts_s"]
        columns += ["shard", "shape", "dtype"]
        columns += ["prompt_shard", "prompt_embeds_shape", "prompt_embeds_dtype"]
        for name in (*self.card.latent_tensors, "prompt_embeds"):
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
        order = [(name, "ascending") for name in ("shard", "sample_id", "caption_digest")]
        return table.select(columns).sort_by(order).combine_chunks()

    def _column(self, name: str) -> pa.Array:
        return self._table[name].chunk(0)

    def _places(self, name: str, *, shard: str, shape: str, dtype: str, rank: int) -> Places:
        shards = self._column(shard).dictionary_encode()
        shapes = self._column(shape)
        self._require(shapes.value_lengths().to_numpy() == rank, f"a {shape} of {rank} numbers")
        dims = shapes.flatten().to_numpy().reshape(-1, rank)
        self._require((dims > 0).all(1), f"a positive {shape}")
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
        counts, of_row = np.unique(num_frames, return_inverse=True)
        latent_frames = [geometry.latent_frames(n) if geometry.takes(n) else 0 for n in counts.tolist()]
        self._require(
            self.shapes[:, 0] == np.array(latent_frames)[of_row],
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
