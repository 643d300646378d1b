"""Identities and records: what a row, a sample, a failure and a finished unit are called and hold.

Identity is a pure function of content and settings, never of position, file name or block layout.
A commit record is the only proof that a unit is done, and all that the index is built from.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from schemas.config import Settings

FORMAT_VERSION = 4
"""Of everything in a dataset folder; raised when a reader of the old one would be wrong."""

Family = Literal["latents", "prompts"]
EMPTY_PROMPT_UNIT = 0
"""The prompts unit that holds the empty caption alone; captions of rows begin in the next one."""
_ID_HEX = 32


def sample_id(
    source_digest: str, *, start_s: float | None, end_s: float | None, clip: int = 0, fingerprint: str
) -> str:
    """Identity of one clip's latents: source bytes, time window, the number of the clip in it, and every
    setting in `fingerprint`."""
    return _digest("latents", source_digest, _seconds(start_s), _seconds(end_s), str(clip), fingerprint)


def caption_digest(caption: str, *, fingerprint: str) -> str:
    """Identity of one caption's prompt embeddings under one text encoder."""
    return _digest("prompts", caption, fingerprint)


def _seconds(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def _digest(*parts: str) -> str:
    """Hash of length-prefixed parts, so that no two lists of parts collide by concatenation."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:_ID_HEX]


class TensorRecord(Settings):
    """Where one stored tensor lies in its shard, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Absolute position of the payload in the shard, bytes."""
    nbytes: int
    checksum: str


class SampleRecord(Settings):
    """One kept sample (or one caption's embeddings) of a unit."""

    key: str
    """sample_id or caption_digest."""
    tensors: dict[str, TensorRecord]
    meta: dict[str, Any]
    """What its `.json` member says: how the clip was decoded, or how the caption was tokenized."""


class FailureRecord(Settings):
    """One clip that could not become a sample."""

    key: str
    stage: str
    reason: str
    message: str
    attempts: int


class UnitCommit(Settings):
    """The commit record of one unit."""

    format_version: int = FORMAT_VERSION
    family: Family
    unit: int
    fingerprint: str
    """Of the family's hard fields."""
    shard: str | None
    """Path relative to the dataset; None where every row failed."""
    sha256: str | None
    nbytes: int
    samples: tuple[SampleRecord, ...]
    quarantined: tuple[FailureRecord, ...] = ()
    seconds: dict[str, float]
    """Wall clock by stage: decode wait, encode, write."""


def unit_name(family: Family, unit: int) -> str:
    """`u00000012` for latents, `t00000012` for prompts."""
    return f"{'u' if family == 'latents' else 't'}{unit:08d}"


def unit_folder(unit: int) -> str:
    """Two-digit fan-out folder: ten thousand units each."""
    return f"{unit // 10_000:02d}"
