"""One unit -> one committed shard: the work that an executor places somewhere.

Frames live and die in this process: the decoder child fills a shared slot, the encoder reads it,
and only latents go on. A clip that fails becomes a failure record; anything else stops the unit,
which is then simply not done. What follows from that is `pipeline.foreman`'s to say.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np

from pipeline.commit import Committing
from pipeline.fetch import Fetcher, Local
from pipeline.generation import Unit
from pipeline.sandbox import Clip, DecodeRequest, DecoderProcess, decode_settings
from pipeline.shard_writer import ShardWriter, record_bytes
from pipeline.source import Source, same_content
from pipeline.text_encode import TextEncoder, load_text_encoder
from pipeline.video_encode import VideoEncoder, load_video_encoder, stored_latents
from schemas.card import Card
from schemas.codec import Tensor, as_float32
from schemas.config import PreprocessConfig
from schemas.dataset import Dataset
from schemas.errors import ClipError, RunError
from schemas.sample import FailureRecord, UnitCommit
from schemas.store import is_url

DECODE_AHEAD = 2
"""Clips in a decoder's shared slots: one being encoded, one being decoded."""
FETCH_AHEAD = 4
"""Remote files of a decoder that are fetched before their turn."""


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
    ours: bool = True
    """False where the record that counts is another driver's, or was found when its answer was lost."""
    protections: dict[str, str] = dataclasses.field(default_factory=dict)
    """What is in force around the decoder, as its child reports it."""
    uncommitted: bytes | None = None
    """The record of a unit whose shard is there, for the one coordinator of the dataset to commit."""

    def facts(self) -> dict[str, Any]:
        """What goes into the log of a run."""
        left_out = ("protections", "uncommitted")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}


@dataclasses.dataclass(frozen=True)
class _Sample:
    """What one row becomes."""

    tensors: Mapping[str, Tensor]
    meta: dict[str, Any]
    video_s: float = 0.0
    """Source seconds it covers."""


_NONE: Mapping[str, FailureRecord] = {}


class UnitWorker:
    """Runs units of either family; encoders and the decoder child are loaded once and kept."""

    def __init__(
        self, config: PreprocessConfig, card: Card, committing: Committing = "link", *, decoders: int = 1
    ) -> None:
        """`committing` is what `open_store` found; `decoders` is the number of decoder children, each of
        which keeps about one core busy."""
        self._config, self._card, self._committing = config, card, committing
        self._num_decoders = decoders
        self._dataset = Dataset(config.output)
        self._fetcher = Fetcher(config.sources, config.limits)
        self._decoders: list[DecoderProcess] = []
        self._video: VideoEncoder | None = None
        self._text: TextEncoder | None = None

    def run(self, unit: Unit, *, condemned: Mapping[str, FailureRecord] = _NONE) -> UnitResult:
        """Make and commit one unit; safe to call again, and beside another worker on the same unit.

        `condemned` rows are not looked at: each becomes the failure it is mapped to.
        """
        started = time.perf_counter()
        seconds: dict[str, float] = {}
        failures = [condemned[row["key"]] for row in unit.rows if row["key"] in condemned]
        video_s = 0.0
        with ShardWriter(
            self._dataset,
            family=unit.family,
            unit=unit.number,
            fingerprint=self._card.family_fingerprint(unit.family),
            committing=self._committing,
        ) as shard:
            for row, sample in self._samples(_without(unit, condemned), seconds):
                if isinstance(sample, ClipError):
                    failures.append(_failure(row, sample))
                    continue
                with _clock(seconds, "write"):
                    shard.add(row["key"], sample.tensors, meta=sample.meta)
                video_s += sample.video_s
            with _clock(seconds, "write"):
                commit = shard.commit(quarantined=failures, seconds=seconds)
        seconds["total"] = time.perf_counter() - started
        return dataclasses.replace(
            result_of(unit, commit),
            video_s=video_s,
            nbytes=commit.nbytes,
            seconds=seconds,
            ours=shard.was_first,
            protections=self._decoders[0].protections if self._decoders else {},
            uncommitted=record_bytes(commit) if self._committing == "coordinator" else None,
        )

    def try_row(self, unit: Unit, key: str) -> None:
        """Decode and encode one row of a unit and keep nothing: does this worker live through it?"""
        others = [row["key"] for row in unit.rows if row["key"] != key]
        for _ in self._samples(_without(unit, others), {}):
            pass

    def close(self) -> None:
        """End the decoder children."""
        while self._decoders:
            self._decoders.pop().close()

    def _samples(
        self, unit: Unit, seconds: dict[str, float]
    ) -> Iterator[tuple[dict[str, Any], _Sample | ClipError]]:
        """Every row of a unit with what is to be stored of it, or why nothing is."""
        try:
            yield from (self._prompts if unit.family == "prompts" else self._latents)(unit, seconds)
        except BaseException:
            self.close()  # the child holds clips of this unit that nobody will ask for
            raise

    def _prompts(self, unit: Unit, seconds: dict[str, float]) -> Iterator[tuple[dict[str, Any], _Sample]]:
        if self._text is None:
            with _clock(seconds, "load"):
                text = load_text_encoder(self._config.text_encoder)
                text.load()
                self._text = text
        with _clock(seconds, "encode"):
            encodings = self._text.encode([row["caption"] for row in unit.rows])
        for row, encoding in zip(unit.rows, encodings, strict=True):
            meta = {"num_tokens": encoding.num_tokens, "truncated": encoding.truncated}
            yield row, _Sample(encoding.tensors, meta)

    def _latents(
        self, unit: Unit, seconds: dict[str, float]
    ) -> Iterator[tuple[dict[str, Any], _Sample | ClipError]]:
        config = self._config
        if self._video is None:
            with _clock(seconds, "load"):
                self._video = load_video_encoder(config.video_encoder)
        for row, clip in self._clips(unit, seconds):
            if isinstance(clip, ClipError):
                yield row, clip
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
                yield row, ClipError("non_finite", message, stage="encode")
                continue
            bucket = config.buckets[clip.bucket]
            meta = {
                "num_frames": bucket.num_frames,
                "height": bucket.height,
                "width": bucket.width,
                "clip": dataclasses.asdict(clip.record),
            }
            yield row, _Sample(tensors, meta, clip.record.duration_s * clip.record.coverage)

    def _clips(
        self, unit: Unit, seconds: dict[str, float]
    ) -> Iterator[tuple[dict[str, Any], Clip | ClipError]]:
        """Every row with its clip or its failure, in order, decoded ahead in the children in turn."""
        while len(self._decoders) < self._num_decoders:
            settings = decode_settings(self._config)
            self._decoders.append(DecoderProcess(**settings, slots=DECODE_AHEAD))
        fetched = self._fetcher.ahead(
            ((row, row["path"], _listed(row)) for row in unit.rows), files=FETCH_AHEAD * self._num_decoders
        )
        turns = iter(zip(fetched, itertools.cycle(self._decoders), strict=False))
        waiting: deque[tuple[dict[str, Any], Local, DecoderProcess]] = deque()
        try:
            while True:
                room = DECODE_AHEAD * self._num_decoders - len(waiting)
                for (row, local), decoder in itertools.islice(turns, room):
                    waiting.append((row, local, decoder))
                    if local.failure is None:
                        _require_unchanged(row)
                        window = {name: row[name] for name in ("start_s", "end_s", "clip")}
                        decoder.submit(DecodeRequest(local.path, **window))
                if not waiting:
                    return
                row, local, decoder = waiting.popleft()
                with local, _clock(seconds, "decode_wait"):
                    try:
                        clip: Clip | ClipError = local.failure or decoder.result()
                    except ClipError as error:
                        clip = error
                if local.failure is None:
                    _require_unchanged(row)
                yield row, clip
        finally:
            fetched.close()
            for _, local, _ in waiting:
                local.close()


def result_of(unit: Unit, commit: UnitCommit) -> UnitResult:
    """What a unit's record says of it, for who did not make it."""
    sources = {row["key"]: row.get("source", "") for row in unit.rows}
    return UnitResult(
        family=unit.family,
        unit=unit.number,
        kept=len(commit.samples),
        failures=tuple((f.reason, sources.get(f.key, "")) for f in commit.quarantined),
        video_s=0.0,
        nbytes=0,
        seconds={},
        ours=False,
    )


def _without(unit: Unit, keys: Container[str]) -> Unit:
    return dataclasses.replace(unit, rows=tuple(row for row in unit.rows if row["key"] not in keys))


def _listed(row: dict[str, Any]) -> Source:
    return Source(row["source_digest"], row["size"], row["mtime_ns"])


def _require_unchanged(row: dict[str, Any]) -> None:
    """RunError where a row's file is not the one that was hashed: its frames would get a wrong identity.
    A download was held against its digest when it came."""
    if not is_url(row["path"]) and not same_content(row["path"], _listed(row)):
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
