"""Commit records and live rows in, rows of the index and of the quarantine out.

`build_tables` makes both tables from the records alone (verification); `CommitReader` makes the rows that
an older index does not hold yet. The trade-off: every number of the index is in a record, so that
the index can always be made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.bucket import video_tokens
from schemas.card import Card
from schemas.dataset import Dataset
from schemas.history import History, column_numbers, positions
from schemas.index import PROMPT_COLUMNS, QUARANTINE_SCHEMA, index_schema, located, prompt_columns
from schemas.sample import FailureRecord, SampleRecord, UnitCommit

BLOCK_ROWS = 16_384
"""Rows of a row group of the index, and most rows that are held while it is made."""
_BLOCK_UNITS = 256
_OF_ROW = (
    *("sample_id", "unit", "prompt_unit", "caption", "caption_digest", "source", "path"),
    *("source_digest", "start_s", "end_s", "clip", "extra"),
)
_OF_CLIP = ("source_fps", "effective_fps", "pts_s", "coverage", "frame_weights")
_COUNTED = ("interpolated", "duplicated", "repaired")
_PROMPT_SCHEMA = pa.schema([("key", pa.string()), *PROMPT_COLUMNS])


def build_tables(dataset: Dataset, card: Card) -> tuple[pa.Table, pa.Table]:
    """(index, quarantine) of everything committed and still asked for, from commit records alone."""
    history = dataset.history()
    reader = CommitReader(dataset, card, history, rows=history.live)
    blocks = [
        reader.read(history.live[start:][:BLOCK_ROWS]) for start in range(0, len(history.live), BLOCK_ROWS)
    ]
    index = [index_schema(card).empty_table(), *(block.index for block in blocks)]
    quarantine = [QUARANTINE_SCHEMA.empty_table(), *(block.quarantine for block in blocks)]
    return pa.concat_tables(index).combine_chunks(), pa.concat_tables(quarantine).combine_chunks()


@dataclass(frozen=True)
class Resolved:
    """What commit records say of some live rows."""

    index: pa.Table
    kept: np.ndarray
    """[index.num_rows] which of the rows."""
    quarantine: pa.Table
    failed: np.ndarray
    """[quarantine.num_rows] which of the rows."""


class CommitReader:
    """Makes rows of the tables from commit records, block by block.

    A record is read once where rows come in the order of `History.live`. What any rows may share is held
    from the start, as columns: 0.25 kB a caption. Of latents only the block is held.
    """

    def __init__(self, dataset: Dataset, card: Card, history: History, *, rows: np.ndarray) -> None:
        """`rows`: all entries of the history that will be asked for."""
        self.schema = index_schema(card)
        self._dataset, self._card, self._history = dataset, card, history
        self._finished = dataset.finished()
        self._prompts = pa.concat_tables(
            [_PROMPT_SCHEMA.empty_table(), *self._read_prompts(rows)]
        ).combine_chunks()
        self._earlier = history.earlier_units()

    def _read_prompts(self, rows: np.ndarray) -> Iterator[pa.Table]:
        asked = self._history.table.select(["prompt_unit", "caption_digest"]).take(rows)
        units = np.intersect1d(column_numbers(asked, "prompt_unit"), self._finished["prompts"])
        wanted = set(asked["caption_digest"].to_pylist())
        for start in range(0, len(units), _BLOCK_UNITS):
            found = [
                {"key": sample.key, **prompt_columns(commit, sample)}
                for commit in self._dataset.commits("prompts", units[start:][:_BLOCK_UNITS].tolist())
                for sample in commit.samples
                if sample.key in wanted
            ]
            yield pa.Table.from_pylist(found, schema=_PROMPT_SCHEMA)

    def read(self, rows: np.ndarray) -> Resolved:
        """What is known of these entries; those whose units are not done, or left them out, are in neither
        table."""
        asked = self._history.table.take(rows)
        kept, failed = self._latents(column_numbers(asked, "unit"))
        prompts = positions(asked["caption_digest"], among=self._prompts["key"])
        index: list[dict[str, Any]] = []
        failures: list[dict[str, Any]] = []
        at: tuple[list[int], list[int]] = ([], [])
        for i, row in enumerate(asked.to_pylist()):
            key = (row["unit"], row["sample_id"])
            if key in kept and prompts[i] >= 0:
                index.append(
                    {**{name: row[name] for name in _OF_ROW}, **_latents_part(*kept[key], self._card)}
                )
                at[0].append(i)
            elif key in failed:
                failures.append(self._failure_row(row, failed[key]))
                at[1].append(i)
        schema = self.schema
        table = pa.Table.from_pylist(index, schema=schema)
        found = self._prompts.take(prompts[at[0]])
        for name, _ in PROMPT_COLUMNS:
            table = table.set_column(schema.get_field_index(name), schema.field(name), found[name])
        return Resolved(
            table,
            np.array(at[0], np.int64),
            pa.Table.from_pylist(failures, schema=QUARANTINE_SCHEMA),
            np.array(at[1], np.int64),
        )

    def _latents(self, units: np.ndarray) -> tuple[_Kept, _Failed]:
        """What the finished ones of these units hold, by (unit, key)."""
        kept: _Kept = {}
        failed: _Failed = {}
        done = np.intersect1d(units, self._finished["latents"])
        for commit in self._dataset.commits("latents", done.tolist()):
            kept.update({(commit.unit, sample.key): (commit, sample) for sample in commit.samples})
            failed.update({(commit.unit, failure.key): failure for failure in commit.quarantined})
        return kept, failed

    def _failure_row(self, row: dict[str, Any], failure: FailureRecord) -> dict[str, Any]:
        earlier = self._earlier.get(row["sample_id"], [])
        _, before = self._latents(np.array(earlier, np.int64))
        tries = [before[unit, failure.key].attempts for unit in earlier if (unit, failure.key) in before]
        return {
            **{name: row[name] for name in QUARANTINE_SCHEMA.names if name in row},
            **{name: getattr(failure, name) for name in ("stage", "reason", "message")},
            "attempts": failure.attempts + sum(tries),
        }


_Kept = dict[tuple[int, str], tuple[UnitCommit, SampleRecord]]
_Failed = dict[tuple[int, str], FailureRecord]


def _latents_part(commit: UnitCommit, sample: SampleRecord, card: Card) -> dict[str, Any]:
    first = sample.tensors[card.latent_tensors[0]]
    clip = sample.meta["clip"]
    num_frames, height, width = sample.meta["num_frames"], sample.meta["height"], sample.meta["width"]
    return {
        "shard": commit.shard,
        "dtype": first.dtype,
        "shape": list(first.shape),
        **located(sample.tensors),
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "bucket": sample.meta.get("bucket", f"{num_frames}x{height}x{width}"),  # said where clips are whole
        **{name: clip[name] for name in _OF_CLIP},
        **{f"num_{name}": len(clip[name]) for name in _COUNTED},
        "num_tokens": video_tokens(first.shape),
    }
