"""One unit -> one committed shard: the work that an executor places somewhere.

    decoder children -> slots -> this thread: copied into batches -> encoder -> writer thread: rows in order

Frames live and die in this process, and only latents go on. A clip that fails becomes a failure record; an
encoder that runs out of memory takes less from then on, and its unit is made again; anything else stops the
unit, which is then simply not done. What follows from that is `pipeline.foreman`'s to say.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np

from pipeline.batches import Batches, Spent
from pipeline.clip import ClipRecord
from pipeline.commit import Committing
from pipeline.decoders import Decoders, DecoderShare, clock
from pipeline.encoders import Encoders, Incident, Shape, Starved, starving
from pipeline.generation import Unit
from pipeline.row_order import RowOrder
from pipeline.shard_writer import ShardWriter
from pipeline.starved import EncoderStarved
from pipeline.video_encode import Moments, stored_latents
from schemas.bucket import bucket_name
from schemas.card import Card
from schemas.codec import Tensor, as_float32
from schemas.config import PreprocessConfig
from schemas.dataset import Dataset
from schemas.errors import ClipError
from schemas.sample import FailureRecord, Family, UnitCommit


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """What the driver learns of a finished unit: small, whatever the unit held."""

    family: Family
    unit: int
    kept: int
    failures: tuple[tuple[str, str], ...]
    """(reason, source) of each failed clip."""
    video_s: float
    """Source seconds covered by the kept clips."""
    nbytes: int
    seconds: dict[str, float]
    """Busy wall clock by stage (decode runs beside the others), and `total`; attempts that ran out of memory
    among it. `decode_wait` is the encoder's wait for clips, `decoders` the time of all decoders together."""
    ours: bool = True
    """False where the record that counts is another driver's, or was found when its answer was lost."""
    protections: dict[str, str] = dataclasses.field(default_factory=dict)
    """What is in force around the decoder, as its child reports it."""
    incidents: tuple[Incident, ...] = ()
    """What gave way where memory ran out since the worker's last unit."""
    captions_cut: int = 0
    """Of the captions kept, those longer than the text encoder takes."""
    uncommitted: bytes | None = None
    """The record of a unit whose shard is there, for the one coordinator of the dataset to commit."""

    def facts(self) -> dict[str, Any]:
        """What goes into the log of a run."""
        left_out = ("protections", "incidents", "uncommitted")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}


@dataclasses.dataclass(frozen=True)
class _Sample:
    """What one row becomes."""

    tensors: Mapping[str, Tensor]
    meta: dict[str, Any]
    video_s: float = 0.0
    """Source seconds it covers."""


@dataclasses.dataclass(frozen=True)
class _Encoding:
    """A clip on its way through the encoder."""

    number: int
    """Of its row in the unit."""
    key: str
    bucket: str
    shape: Shape
    batch_size: int
    """Clips of this shape that are encoded at once, as far as there are so many."""
    record: ClipRecord


_NONE: Mapping[str, FailureRecord] = {}
_ONE_DECODER = DecoderShare()
_Outcome = _Sample | ClipError
_Keep = Callable[[dict[str, Any], _Outcome], None]
"""Takes every row of a unit, in order, with what is to be stored of it, or why nothing is."""
Made = TypeVar("Made")


class UnitWorker:
    """Runs units of either family; encoders and decoder children are loaded once and kept."""

    def __init__(
        self,
        config: PreprocessConfig,
        card: Card,
        committing: Committing = "link",
        share: DecoderShare = _ONE_DECODER,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`committing` is what `open_store` found; `share` is what this worker may have of decoders; `tell`
        takes sentences for a person, at once."""
        self._config, self._card, self._committing, self._tell = config, card, committing, tell
        self._dataset = Dataset(config.output)
        self._decoders = Decoders(config, share, note=self._note, tell=tell)
        self._encoders = Encoders(config, card)
        self._incidents: list[Incident] = []
        """Since the last unit that was made or failed."""

    def run(
        self, unit: Unit, *, condemned: Mapping[str, FailureRecord] = _NONE, then: Unit | None = None
    ) -> UnitResult:
        """Make and commit one unit; safe to call again, and beside another worker on the same unit.

        `condemned` rows are not looked at: each becomes the failure it is mapped to. `then` is the unit that
        this worker will most likely be given next. Where an encoder runs out of memory, something gives way
        and the unit is made again from its start, so that no unit mixes settings; EncoderStarved where
        nothing is left to give. An exception has what gave way before it as `incidents`.
        """
        started, seconds = time.perf_counter(), dict[str, float]()
        self._decoders.counted()  # what they did between units is nobody's
        made = self._until_it_fits(unit, lambda: self._make(unit, condemned, then, seconds))
        seconds["total"] = time.perf_counter() - started
        if unit.family == "latents":
            seconds["decoders"] = self._decoders.counted()
        return dataclasses.replace(made, seconds=seconds, incidents=self._take_incidents())

    def try_row(self, unit: Unit, key: str) -> None:
        """Decode and encode one row of a unit and keep nothing: does this worker live through it?"""
        alone = _without(unit, [row["key"] for row in unit.rows if row["key"] != key])
        self._until_it_fits(unit, lambda: self._rows(alone, lambda *_: None, {}))

    def close(self) -> None:
        """End the decoder children."""
        self._decoders.close()

    def _until_it_fits(self, unit: Unit, work: Callable[[], Made]) -> Made:
        while True:
            try:
                return work()
            except Starved as error:
                lack = error.lack
            except Exception as error:
                error.incidents = self._take_incidents()  # type: ignore[attr-defined]
                raise
            # Only here does nothing hold the error any more, nor the tensors in its traceback.
            try:
                kind, sentence = self._encoders.give_way(lack)
            except EncoderStarved as error:
                error.incidents = self._take_incidents()  # type: ignore[attr-defined]
                raise
            self._note(kind, f"{unit.family} unit {unit.number}: {sentence}")

    def _note(self, kind: str, sentence: str) -> None:
        self._incidents.append((kind, sentence))
        self._tell(f"note: {sentence}")

    def _take_incidents(self) -> tuple[Incident, ...]:
        incidents, self._incidents = tuple(self._incidents), []
        return incidents

    def _make(
        self,
        unit: Unit,
        condemned: Mapping[str, FailureRecord],
        then: Unit | None,
        seconds: dict[str, float],
    ) -> UnitResult:
        failures = [condemned[row["key"]] for row in unit.rows if row["key"] in condemned]
        video_s = 0.0

        def keep(row: dict[str, Any], outcome: _Outcome) -> None:
            nonlocal video_s
            if isinstance(outcome, ClipError):
                failures.append(failure_of(row["key"], outcome))
                return
            shard.add(row["key"], outcome.tensors, meta=outcome.meta)
            video_s += outcome.video_s

        with ShardWriter(
            self._dataset,
            family=unit.family,
            unit=unit.number,
            fingerprint=self._card.family_fingerprint(unit.family),
            committing=self._committing,
        ) as shard:
            self._rows(_without(unit, condemned), keep, seconds, then=then)
            with clock(seconds, "write"):
                commit = shard.commit(quarantined=failures, seconds=seconds)
        return dataclasses.replace(
            result_of(unit, commit, shard),
            video_s=video_s,
            protections=self._decoders.protections,
        )

    def _rows(self, unit: Unit, keep: _Keep, seconds: dict[str, float], *, then: Unit | None = None) -> None:
        """Give every row of a unit to `keep`, in order, on one thread."""
        try:
            if unit.family == "prompts":
                self._prompts(unit, keep, seconds)
            else:
                self._latents(unit, keep, seconds, then)
        except BaseException:
            self.close()  # the child holds clips of this unit that nobody will ask for
            raise

    def _prompts(self, unit: Unit, keep: _Keep, seconds: dict[str, float]) -> None:
        encoder = self._encoders.text(seconds)
        size = self._encoders.captions_at_once()
        for i in range(0, len(unit.rows), size):
            rows = unit.rows[i : i + size]
            with clock(seconds, "encode"), starving("prompts", count=len(rows)):
                encodings = encoder.encode([row["caption"] for row in rows])
            for row, encoding in zip(rows, encodings, strict=True):
                meta: dict[str, Any] = {"num_tokens": encoding.num_tokens, "truncated": encoding.truncated}
                if self._config.text_encoder.kind == "t5":
                    meta["batch_size"] = size
                with clock(seconds, "write"):
                    keep(row, _Sample(encoding.tensors, meta))

    def _latents(self, unit: Unit, keep: _Keep, seconds: dict[str, float], then: Unit | None) -> None:
        self._decoders.begin(unit)  # its first clips come while the weights are loaded
        with self._decoders.uncounted():
            encoder = self._encoders.video(seconds)
        loaded = seconds.get("load", 0.0)

        def write(number: int, outcome: _Outcome) -> None:
            with clock(seconds, "write"):
                keep(unit.rows[number], outcome)

        def sample(clip: _Encoding, moments: Moments, i: int) -> _Outcome:
            with clock(seconds, "write"):
                return self._sample(clip, {name: values[i] for name, values in moments.items()})

        def done(clips: list[_Encoding], moments: Moments) -> None:
            rows.put([(clip.number, partial(sample, clip, moments, i)) for i, clip in enumerate(clips)])

        def encoded(spent: Spent) -> None:
            nonlocal loaded
            started, loaded = seconds.get("load", 0.0) - loaded, seconds.get("load", 0.0)
            seconds["decode_wait"] = seconds.get("decode_wait", 0.0) + spent.waited_s - started
            seconds["encode"] = seconds.get("encode", 0.0) + spent.busy_s
            self._decoders.encoded(spent.busy_s, spent.clips)

        with (
            contextlib.closing(self._decoders.clips(unit, seconds, then)) as decoded,
            RowOrder(write) as rows,
            Batches(encoder, self._encoders, done=done, encoded=encoded) as batches,
        ):
            for number, (row, clip) in enumerate(decoded):
                if isinstance(clip, ClipError):
                    rows.put([(number, partial(_same, clip))])
                    continue
                seconds["decode"] = seconds.get("decode", 0.0) + clip.decode_s
                bucket = bucket_name(self._config.buckets[clip.bucket])
                shape = clip.frames.shape[:3]
                self._decoders.batch = size = self._encoders.clips_at_once(shape)
                encoding = _Encoding(number, row["key"], bucket, shape, size, clip.record)
                batches.add(encoding, clip.frames, tiled=self._card.is_tiled(bucket))
                clip.release()
            batches.finish()
            rows.finish()

    def _sample(self, clip: _Encoding, moments: Moments) -> _Outcome:
        """What is stored of one clip; `moments` [T, C, H, W]."""
        config = self._config.video_encoder
        tensors = stored_latents(moments, config=config, seed=self._config.seed, sample_id=clip.key)
        if not all(np.isfinite(as_float32(tensor)).all() for tensor in tensors.values()):
            return ClipError("non_finite", f"the encoder gave NaN or Inf as {config.dtype}", stage="encode")
        meta: dict[str, Any] = dict(zip(("num_frames", "height", "width"), clip.shape, strict=True))
        meta["clip"] = dataclasses.asdict(clip.record)
        if self._config.frames.clips == "whole":
            meta["bucket"] = clip.bucket
        if config.kind == "diffusers":
            meta["batch_size"] = clip.batch_size
        return _Sample(tensors, meta, clip.record.duration_s * clip.record.coverage)


def result_of(unit: Unit, commit: UnitCommit, shard: ShardWriter | None = None) -> UnitResult:
    """What a unit's record says of it; `shard` is what it was made with, None for who did not make it."""
    sources = {row["key"]: row.get("source", "") for row in unit.rows}
    return UnitResult(
        family=unit.family,
        unit=unit.number,
        kept=len(commit.samples),
        failures=tuple((f.reason, sources.get(f.key, "")) for f in commit.quarantined),
        video_s=0.0,
        nbytes=commit.nbytes if shard else 0,
        seconds={},
        ours=shard is not None and shard.was_first,
        uncommitted=shard.uncommitted(commit) if shard else None,
        captions_cut=sum(bool(sample.meta.get("truncated")) for sample in commit.samples),
    )


def _without(unit: Unit, keys: Container[str]) -> Unit:
    return dataclasses.replace(unit, rows=tuple(row for row in unit.rows if row["key"] not in keys))


def _same(error: ClipError) -> _Outcome:
    return error


def failure_of(key: str, error: ClipError) -> FailureRecord:
    """The record of a row that could not become a sample."""
    return FailureRecord(
        key=key, stage=error.stage, reason=error.reason, message=error.message, attempts=error.attempts
    )
