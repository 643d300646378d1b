"""What a decoder child says, held against what it was asked.

In: a line of it. Out: a typed answer, or `BadAnswer`. A decoder that a file took over says what the file
wants, so every line is a claim: of the kind that is due, with values in range and text that a terminal and a
table can take. Nothing else of it reaches the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, StringConstraints, TypeAdapter

from pipeline.clip import ClipRecord, Placed
from schemas.config import SEVERAL, BucketConfig, FramesConfig, LimitsConfig

TEXT_CHARS = 2000
"""Of a text from the child."""
MOST_NOTES = 100
"""Of a clip; a sound child has one of each kind."""
_LARGEST = 2**53
"""Whole numbers below fit every column and every reader of JSON."""
_Reason = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
_Answer = TypeVar("_Answer")


class BadAnswer(Exception):
    """The child said what a sound one does not say."""


class Ready(BaseModel):
    """A new child's first line; it has not seen a file."""

    at: float
    protections: dict[str, str]
    fatal: str | None
    """Why it can decode nothing."""
    denied: bool
    """Whether it may not open the file it was asked about."""


class Begun(BaseModel):
    """It takes up the next request."""

    at: float


class Failed(BaseModel):
    """The clip cannot become a sample."""

    id: int
    error: _Reason
    message: str
    denied: bool = False
    """Whether it may not open the file."""


class Fatal(BaseModel):
    """The run must stop."""

    id: int
    fatal: str


class PlacedAnswer(BaseModel):
    """What would become of a clip."""

    id: int
    placed: Placed


class DecodedAnswer(BaseModel):
    """The clip's frames are in its slot."""

    id: int
    shape: list[int]
    bucket: int
    record: ClipRecord
    decode_s: float


Answer = PlacedAnswer | DecodedAnswer | Failed | Fatal
READY, BEGUN = TypeAdapter(Ready), TypeAdapter(Begun)
PLACED: TypeAdapter[Answer] = TypeAdapter(PlacedAnswer | Failed | Fatal)
DECODED: TypeAdapter[Answer] = TypeAdapter(DecodedAnswer | Failed | Fatal)


def parse(line: bytes, kind: TypeAdapter[_Answer]) -> _Answer:
    """The answer in a line; BadAnswer where it is not of that kind."""
    try:
        return kind.validate_python(_clean(json.loads(line, parse_constant=_refuse)))
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"a malformed answer: {type(error).__name__}") from None


def plain(text: str) -> str:
    """The text, cut, without what would steer a terminal or could not be stored."""
    return "".join(char if char.isprintable() else " " for char in text[:TEXT_CHARS])


def check_decoded(
    answer: DecodedAnswer,
    *,
    clip: int,
    buckets: Sequence[BucketConfig],
    lengths: Sequence[Sequence[int]],
    limits: LimitsConfig,
) -> None:
    """BadAnswer where the frames are not those of a bucket and of one of its `lengths`, or the record not
    one of such frames from a file within the limits."""
    _require(0 <= answer.bucket < len(buckets), "bucket")
    bucket, record = buckets[answer.bucket], answer.record
    num_frames = answer.shape[0] if answer.shape else 0
    _require(num_frames in lengths[answer.bucket], "length")
    _require(answer.shape == [num_frames, bucket.height, bucket.width, 3], "shape")
    _require(len(record.pts_s) == len(record.frame_weights) == num_frames, "number of frames")
    _require(min(record.frame_weights) >= 0, "weight")
    for positions in (record.interpolated, record.duplicated, record.repaired):
        _require(all(a < b for a, b in pairwise((-1, *positions, num_frames))), "position")
    _require(record.clip == clip, "clip")
    sizes = (record.source_width, record.source_height, record.num_pictures, record.num_fed)
    _require(min(sizes) > 0, "file")
    times = (0.0, *record.pts_s, limits.max_seconds)
    _require(all(a <= b for a, b in pairwise(times)), "time")
    _require(answer.decode_s >= 0 < record.duration_s, "time")
    _require(min(record.source_fps, record.effective_fps) > 0, "rate")
    _require(0 < record.coverage <= 1, "coverage")
    _require(len(record.notes) <= MOST_NOTES, "notes")


def check_placed(
    placed: Placed, *, lengths: Sequence[Sequence[int]], frames: FramesConfig, limits: LimitsConfig
) -> None:
    """BadAnswer where there is no such bucket, none of its `lengths`, or more clips than a file within the
    limits can hold."""
    info = placed.info
    _require(0 <= placed.bucket < len(lengths), "bucket")
    _require(placed.num_frames in lengths[placed.bucket], "length")
    sizes = (info.width, info.height, info.display_width, info.display_height, info.num_pictures)
    _require(min(sizes) > 0 and min(info.fps, info.duration_s) >= 0, "file")
    _require(len(placed.notes) <= MOST_NOTES, "notes")
    most = max(limits.max_frames, math.ceil(limits.max_seconds * frames.target_fps))
    _require(1 <= placed.num_clips <= (most if frames.clips in SEVERAL else 1), "number of clips")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise BadAnswer(f"an impossible answer: {what}")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _clean(value: Any) -> Any:
    """A value of JSON with every text plain; ValueError for a number that is out of range."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {plain(name): _clean(item) for name, item in value.items()}
    if isinstance(value, int | float) and not (abs(value) < _LARGEST):
        raise ValueError("out of range")
    return value
