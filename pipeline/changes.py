"""What a manifest asks for, held against what its dataset was asked for before: what changed, and why.

In: rows, the identity of their files, the history. Out: the next generation and, per row, why it runs. Rows
are matched by what they are, so order, duplicates of content and edited captions change only what they
must. All of it is columns; a Python object is made per changed row at most.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.source import Source
from schemas.card import Card
from schemas.dataset import Dataset
from schemas.errors import DatasetError, ManifestError
from schemas.history import (
    GENERATION_SCHEMA,
    KEY,
    UNIT,
    History,
    codes_of,
    column_numbers,
    positions,
    row_keys,
)
from schemas.index import read_index, read_quarantine
from schemas.manifest import ManifestRow
from schemas.sample import EMPTY_PROMPT_UNIT, Family, caption_digest, sample_id

_NOTED = ("source", "size", "mtime_ns", "clips", "extra")
"""What is written down of a row and may change without making anything stale."""


@dataclass(frozen=True)
class Changes:
    """What a manifest asks for, held against what its dataset was asked for before."""

    table: pa.Table
    """The next generation; without rows where nothing changed."""
    cause: list[str]
    """Per row asked for: "" unchanged, "new", "caption changed", "file replaced", "moved", "left out"."""
    keys: dict[Family, pa.ChunkedArray]
    """Per row asked for."""
    removed: int
    """Live rows that are not asked for any more, and did not become another row."""
    unit: np.ndarray
    """[rows asked for] where the latents are, or will be."""
    prompt_unit: np.ndarray


def find_changes(
    dataset: Dataset,
    card: Card,
    *,
    rows: Sequence[ManifestRow],
    sources: Mapping[str, Source],
    unit_rows: int,
    history: History,
) -> Changes:
    """What the next generation would hold for these rows; writes nothing."""
    asked, live = _asked(rows, sources), history.live_table()
    at = positions(row_keys(asked), among=row_keys(live))
    found = live.take(np.maximum(at, 0)) if live.num_rows else asked

    def same(name: str) -> np.ndarray:
        return (at >= 0) & pc.equal(asked[name], found[name]).to_numpy()

    kept = same("source_digest")
    noted = kept & ~np.logical_and.reduce([same(name) for name in _NOTED])
    asked = _with_keys(asked, card, kept=kept, found=found)
    finished, left_out = dataset.finished(), np.zeros(asked.num_rows, bool)
    keys: dict[Family, pa.ChunkedArray] = {family: asked[name] for family, name in KEY.items()}
    units: dict[Family, np.ndarray] = {}
    for family in KEY:
        unit, fresh = _units(history, family, asked)
        lacking = _left_out(dataset, history, family, keys[family], unit, done=finished[family])
        if family == "prompts":
            empty = pc.equal(keys[family], card.empty_prompt).to_numpy()
            unit[empty], fresh[empty], lacking[empty] = EMPTY_PROMPT_UNIT, False, False
        units[family] = _allot(keys[family], unit, fresh | lacking, history.next_unit(family), unit_rows)
        left_out |= lacking

    gone = np.ones(live.num_rows, bool)
    gone[at[at >= 0]] = False
    cause, removed = _causes(asked, at=at, kept=kept, left_out=left_out, gone=live.take(np.flatnonzero(gone)))
    asked = asked.append_column("op", pa.repeat("add", asked.num_rows))
    for family, name in UNIT.items():
        asked = asked.append_column(name, pa.array(units[family]))
    added = asked.select(GENERATION_SCHEMA.names).take(np.flatnonzero(~kept | noted | left_out))
    dropped = live.take(np.flatnonzero(gone))
    dropped = dropped.set_column(0, "op", pa.repeat("remove", dropped.num_rows))
    return Changes(
        pa.concat_tables([added, dropped]), cause, keys, removed, units["latents"], units["prompts"]
    )


def _asked(rows: Sequence[ManifestRow], sources: Mapping[str, Source]) -> pa.Table:
    """The rows as columns of a generation, but for those that say where they are stored."""
    columns = {
        "source": [row.source for row in rows],
        "path": [row.path for row in rows],
        "source_digest": [sources[row.path].digest for row in rows],
        "size": [sources[row.path].size for row in rows],
        "mtime_ns": [sources[row.path].mtime_ns for row in rows],
        "start_s": [row.start_s for row in rows],
        "end_s": [row.end_s for row in rows],
        "clip": [row.clip for row in rows],
        "clips": [row.clips for row in rows],
        "caption": [row.caption for row in rows],
        "extra": [_extra(row.extra) if row.extra else "" for row in rows],
    }
    try:
        return pa.table(columns, schema=pa.schema([GENERATION_SCHEMA.field(name) for name in columns]))
    except UnicodeEncodeError as error:
        raise ManifestError(
            f"{error.object!r}: expected Unicode text, found bytes that are none, such as in the name of the "
            "folder of the manifest; rename it"
        ) from None


def _extra(columns: dict[str, Any]) -> str:
    """JSON; NaN and infinities, which it has no words for, become null."""
    try:
        return json.dumps(columns, sort_keys=True, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(columns, default=str)
        return json.dumps(json.loads(text, parse_constant=lambda _: None), sort_keys=True)


def _with_keys(asked: pa.Table, card: Card, *, kept: np.ndarray, found: pa.Table) -> pa.Table:
    """`asked` with sample_id and caption_digest: hashed for what is new, looked up for what is kept."""
    latents, prompts = (card.family_fingerprint(family) for family in ("latents", "prompts"))
    new = np.flatnonzero(~kept)
    columns = ("source_digest", "start_s", "end_s", "clip", "caption")
    rows = zip(*(asked[name].take(new).to_pylist() for name in columns), strict=True)
    ids, digests = [], []
    for source, start_s, end_s, clip, caption in rows:
        ids.append(sample_id(source, start_s=start_s, end_s=end_s, clip=clip, fingerprint=latents))
        digests.append(caption_digest(caption, fingerprint=prompts))
    for name, values in (("sample_id", ids), ("caption_digest", digests)):
        column = pa.array(values, pa.string())
        if kept.any():
            column = pc.replace_with_mask(found[name].combine_chunks(), pa.array(~kept), column)
        asked = asked.append_column(name, column)
    return asked


def _units(history: History, family: Family, asked: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The unit that each row's key belongs to, and which rows have a key that was never asked for."""
    held = history.held(family)
    at = positions(asked[KEY[family]], among=history.table[KEY[family]].take(held.row))
    return np.append(held.unit, -1)[at], at < 0


def _allot(
    keys: pa.ChunkedArray, unit: np.ndarray, fresh: np.ndarray, next_unit: int, unit_rows: int
) -> np.ndarray:
    """`unit` where it is known; the `fresh` keys fill new units of `unit_rows`, in their order."""
    unit = unit.copy()
    unit[fresh] = next_unit + codes_of(keys.filter(pa.array(fresh))) // unit_rows
    return unit


def _left_out(
    dataset: Dataset,
    history: History,
    family: Family,
    keys: pa.ChunkedArray,
    unit: np.ndarray,
    *,
    done: np.ndarray,
) -> np.ndarray:
    """Which keys were not in their unit when it was made (it is `done`), so that they need another.

    That happens when no row asked for them when the unit ran: it had been removed, or edited.
    """
    waiting = np.isin(unit, done)
    tables = [read_index, read_quarantine]
    if family == "prompts":  # the quarantine does not name these, so commits of its rows would be read
        tables.remove(read_quarantine)
        waiting &= positions(keys, among=history.once_hidden(family)) >= 0
    if waiting.any():
        for read in tables:
            try:
                known = read(dataset.root, columns=[KEY[family], UNIT[family]])
            except DatasetError:  # what it holds is found in the commits
                continue
            if known.num_rows:
                at = positions(keys, among=known[KEY[family]])
                waiting &= (at < 0) | (column_numbers(known, UNIT[family])[at] != unit)
    rows = np.flatnonzero(waiting)
    missing = np.zeros(len(unit), bool)
    by_unit = defaultdict(list)
    for row, key in zip(rows.tolist(), keys.take(rows).to_pylist(), strict=True):
        by_unit[int(unit[row])].append((row, key))
    for commit in dataset.commits(family, by_unit):
        held = {sample.key for sample in commit.samples} | {failed.key for failed in commit.quarantined}
        missing[[row for row, key in by_unit[commit.unit] if key not in held]] = True
    return missing


def _causes(
    asked: pa.Table, *, at: np.ndarray, kept: np.ndarray, left_out: np.ndarray, gone: pa.Table
) -> tuple[list[str], int]:
    """Why each row runs, and how many of the rows that are `gone` did not become another one."""
    cause = np.where(
        kept, np.where(left_out, "left out", ""), np.where(at >= 0, "file replaced", "new")
    ).tolist()
    names = ("sample_id", "caption_digest")
    places: dict[str, list[str]] = defaultdict(list)  # of a clip -> what it was
    samples: dict[tuple[str, str], int] = defaultdict(int)  # what it was -> how often
    for place, key, caption in zip(
        row_keys(gone, caption=False).to_pylist(), *(gone[name].to_pylist() for name in names), strict=True
    ):
        places[place].append(key)
        samples[key, caption] += 1
    removed = gone.num_rows
    new = np.flatnonzero(at < 0) if removed else at[:0]
    there = asked.take(new)
    found = zip(
        new.tolist(),
        row_keys(there, caption=False).to_pylist(),
        *(there[name].to_pylist() for name in names),
        strict=True,
    )
    for row, place, key, caption in found:
        if places[place]:
            cause[row] = "caption changed" if key in places[place] else "file replaced"
            places[place].pop()
        elif samples[key, caption]:
            cause[row] = "moved"
            samples[key, caption] -= 1
        else:
            continue
        removed -= 1
    return cause, removed
