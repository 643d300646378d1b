"""What an index says of its clips: one pass over `index.parquet`, block by block and column by column.

In: an open index. Out: sums, spreads and bars of what the clips are, buckets, repeated captions, and the rows
at the far ends. Memory holds a block of rows and one small entry for each caption that differs. A clip with
several captions is one clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.histogram import Histogram
from schemas.card import Card
from schemas.index import PROMPT_TENSORS, index_rows

SHARE_BARS = 20
FAR_ENDS = 8
"""Rows that are listed at each far end."""
_REPEATED = 5
_COLUMNS = (
    "sample_id",
    "clip",
    "caption",
    "caption_digest",
    "num_frames",
    "bucket",
    "source_fps",
    "effective_fps",
    "coverage",
    "num_interpolated",
    "num_duplicated",
    "num_repaired",
    "frame_weights",
    "num_tokens",
)
_SHOWN = ("sample_id", "source", "start_s", "end_s", "clip", "caption")


@dataclass
class Share:
    """Values from 0 to 1: how many lie in each of SHARE_BARS equal bars, are as usual, or far off."""

    usual: Literal[0, 1]
    """The value that is as it should be."""
    counts: np.ndarray = field(default_factory=lambda: np.zeros(SHARE_BARS, np.int64))
    as_usual: int = 0
    far: int = 0
    """More than half away from `usual`."""

    def add_all(self, values: np.ndarray) -> None:
        self.counts += np.histogram(values.clip(0, 1), bins=SHARE_BARS, range=(0, 1))[0]
        away = 1 - values if self.usual else values
        self.as_usual += int((away <= 0).sum())
        self.far += int((away > 0.5).sum())

    def as_dict(self) -> dict[str, Any]:
        return {
            "bars": self.counts.tolist(),
            "known": int(self.counts.sum()),
            "as_usual": self.as_usual,
            "far": self.far,
        }


class _FarEnd:
    """The rows of the greatest values so far; of equal ones those that come first."""

    def __init__(self) -> None:
        self.numbers, self.values = np.empty(0, np.int64), np.empty(0)

    def add_all(self, numbers: np.ndarray, values: np.ndarray) -> None:
        numbers, values = np.concatenate([self.numbers, numbers]), np.concatenate([self.values, values])
        keep = np.argsort(-values, kind="stable")[:FAR_ENDS]
        self.numbers, self.values = numbers[keep], values[keep]


class IndexNumbers:
    """The numbers of one index."""

    def __init__(self, file: pq.ParquetFile, card: Card) -> None:
        """Reads it all."""
        self._tensors = [f"{name}_nbytes" for name in (*card.latent_tensors, *card.image_tensors)]
        self._prompts = [f"{name}_nbytes" for name in PROMPT_TENSORS]
        self._file, self._imported = file, card.settings.frames is None
        self.rows = self.asked = self.clips = self.tokens = self.latent_bytes = self.repaired = 0
        self.spreads = {
            name: Histogram()
            for name in ("seconds", "source_fps", "stride", "caption_chars", "tokens", "frames", "busiest")
        }
        self.shares = {"coverage": Share(usual=1), "made_up": Share(usual=0)}
        self._ends = {name: _FarEnd() for name in ("coverage", "made_up", "repaired")}
        self._last = ""
        buckets, captions = [], []
        for group in range(file.num_row_groups):
            block = file.read_row_group(group, columns=[*_COLUMNS, *self._tensors, *self._prompts])
            buckets.append(self._add_clips(block))
            captions.append(self._add_captions(block))
            self.rows += block.num_rows
        self.buckets = _summed(buckets, "bucket").sort_by([("clips", "descending")]).to_pylist()
        told = _summed(captions, "caption_digest")
        self.captions, self.asked = told.num_rows, int(pc.sum(told["asked"]).as_py() or 0)
        self.prompt_bytes = int(pc.sum(pc.divide(told["nbytes"], told["rows"])).as_py() or 0)
        self._repeated = told.sort_by([("asked", "descending")]).slice(0, _REPEATED)

    def _add_clips(self, block: pa.Table) -> pa.Table:
        """Take in the clips that begin in a block; of each of their buckets the sums."""
        ids = block["sample_id"].combine_chunks()
        before = pa.concat_arrays([pa.array([self._last], ids.type), ids.slice(0, max(0, len(ids) - 1))])
        self._last = ids[-1].as_py() if len(ids) else self._last
        new = pc.not_equal(ids, before)
        numbers = self.rows + np.flatnonzero(new.to_numpy(zero_copy_only=False))
        block = block.filter(new)
        self.clips += block.num_rows

        frames, rate = _floats(block["num_frames"]), _floats(block["effective_fps"])
        seconds = frames / np.where(rate > 0, rate, np.nan)
        self._spread("seconds", seconds)
        self._spread("frames", frames)
        self._spread("source_fps", _floats(block["source_fps"]))
        self._spread("stride", _floats(block["source_fps"]) / np.where(rate > 0, rate, np.nan))
        self._spread("tokens", _floats(block["num_tokens"]))
        self._spread("busiest", _greatest(block["frame_weights"]))

        coverage = _floats(block["coverage"])
        made_up = (_floats(block["num_interpolated"]) + _floats(block["num_duplicated"])) / frames
        if self._imported:  # whose cache does not tell, so the index has zeros
            made_up = np.full_like(made_up, np.nan)
        repaired = _floats(block["num_repaired"]) / frames
        self.shares["coverage"].add_all(coverage[np.isfinite(coverage)])
        self.shares["made_up"].add_all(made_up[np.isfinite(made_up)])
        self.repaired += int((repaired > 0).sum())
        for name, values in (("coverage", 1 - coverage), ("made_up", made_up), ("repaired", repaired)):
            there = values > 0
            self._ends[name].add_all(numbers[there], values[there])

        nbytes = np.sum([_floats(block[name]) for name in self._tensors], axis=0, initial=0.0)
        self.latent_bytes += int(np.nansum(nbytes))
        self.tokens += int(pc.sum(block["num_tokens"]).as_py() or 0)
        return pa.table(
            {
                "bucket": block["bucket"],
                "clips": np.ones(len(frames), np.int64),
                "seconds": np.nan_to_num(seconds),
                "tokens": block["num_tokens"],
                "nbytes": np.nan_to_num(nbytes) * np.ones(len(frames)),
            }
        )

    def _add_captions(self, block: pa.Table) -> pa.Table:
        """Take in the captions of a block; of each its rows, those that are the first clip of what a manifest
        asked for, and bytes (as often as there are rows)."""
        self._spread("caption_chars", _floats(pc.utf8_length(block["caption"])))
        nbytes = np.sum([_floats(block[name]) for name in self._prompts], axis=0)
        return pa.table(
            {
                "caption_digest": block["caption_digest"],
                "rows": np.ones(block.num_rows, np.int64),
                "asked": pc.cast(pc.equal(pc.fill_null(block["clip"], 0), 0), pa.int64()),
                "nbytes": np.nan_to_num(nbytes),
            }
        )

    def _spread(self, name: str, values: np.ndarray) -> None:
        self.spreads[name].add_all(values[np.isfinite(values)])

    def far_ends(self) -> dict[str, list[dict[str, Any]]]:
        """The rows with the least coverage, most frames made up, most frames repaired, each with its share;
        none where that is as it should be."""
        found = {}
        for name, end in self._ends.items():
            rows = index_rows(self._file, end.numbers, columns=_SHOWN)
            shares = 1 - end.values if name == "coverage" else end.values
            found[name] = [row | {"share": share} for row, share in zip(rows, shares.tolist(), strict=True)]
        return found

    def repeated_captions(self) -> list[dict[str, Any]]:
        """Captions of more than one row of a manifest, with how many; most frequent first. Several clips of
        one row are no repetition."""
        told = [row for row in self._repeated.to_pylist() if row["asked"] > 1]
        if not told:
            return []
        digests = self._file.read(columns=["caption_digest"])["caption_digest"]
        numbers = [pc.index(digests, row["caption_digest"]).as_py() for row in told]
        rows = index_rows(self._file, np.array(numbers), columns=["caption"])
        return [
            {"caption": row["caption"], "rows": each["asked"]} for row, each in zip(rows, told, strict=True)
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "asked": self.asked,
            "clips": self.clips,
            "captions": self.captions,
            "video_s": self.spreads["seconds"].sum,
            "tokens": self.tokens,
            "latent_bytes": self.latent_bytes,
            "prompt_bytes": self.prompt_bytes,
            "repaired": self.repaired,
            "spreads": {name: values.spread() for name, values in self.spreads.items()},
            "shares": {name: values.as_dict() for name, values in self.shares.items()},
            "buckets": self.buckets,
            "far_ends": self.far_ends(),
            "repeated_captions": self.repeated_captions(),
        }


def _summed(tables: Sequence[pa.Table], key: str) -> pa.Table:
    """One row for each `key`, the sum of every other column."""
    if not tables:
        return pa.table({key: pa.array([], pa.string()), "clips": [], "rows": [], "asked": [], "nbytes": []})
    grouped = [_by(table, key) for table in tables]
    return _by(pa.concat_tables(grouped), key)


def _by(table: pa.Table, key: str) -> pa.Table:
    others = [name for name in table.column_names if name != key]
    summed = table.group_by(key).aggregate([(name, "sum") for name in others])
    return summed.select([key, *(f"{name}_sum" for name in others)]).rename_columns([key, *others])


def _floats(column: Any) -> np.ndarray:
    """A column of numbers, NaN where there is none."""
    return pc.cast(column, pa.float64()).to_numpy()


def _greatest(column: pa.ChunkedArray) -> np.ndarray:
    """Of each list of numbers; lists that are empty, or none, are left out."""
    lists = column.combine_chunks().drop_null()
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    starts = np.cumsum(lengths) - lengths
    return np.maximum.reduceat(values, starts[lengths > 0]) if values.size else np.empty(0)
