"""One unit -> one committed shard: the work that an executor places somewhere.

Frames live and die in this process: the decoder child fills a shared slot, the encoder reads it,
and only latents go on. A clip that fails becomes a failure record; anything else stops the unit,
which is then simply not done.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.generation import Unit
from pipeline.sandbox import Clip, DecodeRequest, DecoderProcess, decode_settings
from pipeline.shard_writer import ShardWriter
from pipeline.source import Source, same_content
from pipeline.text_encode import TextEncoder, load_text_encoder
from pipeline.video_encode import VideoEncoder, load_video_encoder, stored_latents
from schemas.card import Card
from schemas.codec import as_float32
from schemas.config import PreprocessConfig
from schemas.dataset import Dataset
from schemas.errors import ClipError, RunError
from schemas.sample import FailureRecord

DECODE_AHEAD = 2
"""Clips in a decoder's shared slots: one being encoded, one being decoded."""


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """What the driver learns of a finished unit: small, whatever the unit held."""

    family: str
    unit: int
    kept: int
    failures: tuple[tuple[str, str], ...]
    """(reason, source) of each failed clip."""
    video_s: float
    """Source seconds covered by the kept clips."""
    nbytes: int
    seconds: dict[str, float]
    """Busy wall clock by stage (decode runs beside the others), and `total`."""


class UnitWorker:
    """Runs units of either family; encoders and the decoder child are loaded once and kept."""

    def __init__(self, config: PreprocessConfig, card: Card, *, decoders: int = 1) -> None:
        """`decoders` is the number of decoder children, each of which keeps about one core busy."""
        self._config, self._card, self._num_decoders = config, card, decoders
        self._dataset = Dataset(Path(config.output))
        self._decoders: list[DecoderProcess] = []
        self._video: VideoEncoder | None = None
        self._text: TextEncoder | None = None

    def run(self, unit: Unit) -> UnitResult:
        """Make and commit one unit; safe to call again, and beside another worker on the same unit."""
        started = time.perf_counter()
        with ShardWriter(
            self._dataset,
            family=unit.family,
            unit=unit.number,
            fingerprint=self._card.family_fingerprint(unit.family),
        ) as shard:
            seconds: dict[str, float] = {}
            if unit.family == "prompts":
                failures, video_s = self._prompts(unit, shard, seconds)
            else:
                try:
                    failures, video_s = self._latents(unit, shard, seconds)
                except BaseException:
                    self.close()  # the child holds clips of this unit that nobody will ask for
                    raise
            with _clock(seconds, "write"):
                commit = shard.commit(quarantined=failures, seconds=seconds)
        seconds["total"] = time.perf_counter() - started
        sources = {row["key"]: row.get("source", "") for row in unit.rows}
        return UnitResult(
            family=unit.family,
            unit=unit.number,
            kept=len(commit.samples),
            failures=tuple((f.reason, sources.get(f.key, "")) for f in commit.quarantined),
            video_s=video_s,
            nbytes=commit.nbytes,
            seconds=seconds,
        )

    def close(self) -> None:
        """End the decoder children."""
        while self._decoders:
            self._decoders.pop().close()

    def _prompts(
        self, unit: Unit, shard: ShardWriter, seconds: dict[str, float]
    ) -> tuple[list[FailureRecord], float]:
        if self._text is None:
            with _clock(seconds, "load"):
                self._text = load_text_encoder(self._config.text_encoder)
                self._text.load()
        with _clock(seconds, "encode"):
            encodings = self._text.encode([row["caption"] for row in unit.rows])
        with _clock(seconds, "write"):
            for row, encoding in zip(unit.rows, encodings, strict=True):
                meta = {"num_tokens": encoding.num_tokens, "truncated": encoding.truncated}
                shard.add(row["key"], encoding.tensors, meta=meta)
        return [], 0.0

    def _latents(
        self, unit: Unit, shard: ShardWriter, seconds: dict[str, float]
    ) -> tuple[list[FailureRecord], float]:
        config = self._config
        if self._video is None:
            with _clock(seconds, "load"):
                self._video = load_video_encoder(config.video_encoder)
        failures: list[FailureRecord] = []
        video_s = 0.0
        for row, clip in self._clips(unit, seconds):
            if isinstance(clip, ClipError):
                failures.append(_failure(row, clip))
                continue
            seconds["decode"] = seconds.get("decode", 0.0) + clip.decode_s
            with _clock(seconds, "encode"):
                moments = self._video.encode(clip.frames[None])
                clip.release()
                tensors = stored_latents(
                    {name: value[0] for name, value in moments.items()},
                    config=config.video_encoder,
                    seed=config.seed,
                    sample_id=row["key"],
                )
                finite = all(np.isfinite(as_float32(tensor)).all() for tensor in tensors.values())
            if not finite:
                message = f"the encoder gave NaN or Inf as {config.video_encoder.dtype}"
                failures.append(_failure(row, ClipError("non_finite", message, stage="encode")))
                continue
            bucket = config.buckets[clip.bucket]
            meta = {
                "num_frames": bucket.num_frames,
                "height": bucket.height,
                "width": bucket.width,
                "clip": dataclasses.asdict(clip.record),
            }
            with _clock(seconds, "write"):
                shard.add(row["key"], tensors, meta=meta)
            video_s += clip.record.duration_s * clip.record.coverage
        return failures, video_s

    def _clips(
        self, unit: Unit, seconds: dict[str, float]
    ) -> Iterator[tuple[dict[str, Any], Clip | ClipError]]:
        """Every row with its clip or its failure, in order, decoded ahead in the children in turn."""
        while len(self._decoders) < self._num_decoders:
            settings = decode_settings(self._config)
            self._decoders.append(DecoderProcess(**settings, slots=DECODE_AHEAD))
        here = (row for row in unit.rows if row["live"] or _is_unchanged(row))
        turns = iter(zip(here, itertools.cycle(self._decoders), strict=False))
        waiting: deque[tuple[dict[str, Any], DecoderProcess]] = deque()
        while True:
            for row, decoder in itertools.islice(turns, DECODE_AHEAD * self._num_decoders - len(waiting)):
                _require_unchanged(row)
                window = {name: row[name] for name in ("start_s", "end_s", "clip")}
                decoder.submit(DecodeRequest(row["path"], **window))
                waiting.append((row, decoder))
            if not waiting:
                return
            row, decoder = waiting.popleft()
            with _clock(seconds, "decode_wait"):
                try:
                    clip: Clip | ClipError = decoder.result()
                except ClipError as error:
                    clip = error
            _require_unchanged(row)
            yield row, clip


def _is_unchanged(row: dict[str, Any]) -> bool:
    return same_content(row["path"], Source(row["source_digest"], row["size"], row["mtime_ns"]))


def _require_unchanged(row: dict[str, Any]) -> None:
    """RunError where a row's file is not the one that was hashed: its frames would get a wrong identity."""
    if not _is_unchanged(row):
        raise RunError(
            f"{row['path']} is gone or was replaced since it was listed; "
            "run the same command again: it looks at every file anew"
        )


def _failure(row: dict[str, Any], error: ClipError) -> FailureRecord:
    return FailureRecord(
        key=row["key"], stage=error.stage, reason=error.reason, message=error.message, attempts=error.attempts
    )


class _clock:
    """Adds the wall clock of a `with` block to `seconds[stage]`."""

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self._seconds, self._stage = seconds, stage

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._started
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + spent
