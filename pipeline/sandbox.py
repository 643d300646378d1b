"""Decoding in a child process, so that a file can at worst cost itself.

In: `DecodeRequest`s. Out: `Clip`s in the order asked, their frames in shared memory, or ClipError. Native
decoders crash, hang and eat memory on bad files, and no thread can stop them; a process can be killed.
One child serves one `DecoderProcess`, decodes ahead into a ring of slots while the caller uses the clip
before, and is replaced when it dies. A clip whose decode kills the child is tried once more, alone in
a new child, and fails as `decoder_crash` if it does so again; one that takes too long fails as `timeout`,
and one over whose decoding our own code stumbles as `internal`. What the kernel here cannot enforce is
said once, on stderr, and stops nothing.

A file can also take its decoder over. What the child says is a claim then (`pipeline.child_answers`), and one
that cannot be counts as a crash; but what it does to its own memory, the slots among it, is not seen.

F frames, H, W pixels of the bucket.
"""

from __future__ import annotations

import fcntl
import itertools
import math
import mmap
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from pipeline.child_answers import (
    BEGUN,
    DECODED,
    PLACED,
    READY,
    Answer,
    BadAnswer,
    DecodedAnswer,
    Failed,
    Fatal,
    PlacedAnswer,
    Ready,
    check_decoded,
    check_placed,
    parse,
)
from pipeline.child_process import START_TIMEOUT_S, ChildProcess
from pipeline.clip import ClipRecord, Placed
from pipeline.confine import NOT_ENFORCED
from pipeline.video_encode import load_video_encoder
from schemas.bucket import clip_lengths, own_lengths
from schemas.config import (
    BucketConfig,
    DecodeConfig,
    FramesConfig,
    LimitsConfig,
    PictureConfig,
    PreprocessConfig,
    ResizeConfig,
)
from schemas.errors import ClipError, RunError

MAX_STARTS = 3
"""A child that is killed while it starts is started this often: it has not seen a file yet."""
BEGIN_S = 1.0
"""Of grace for a child to take up its next clip, before the clip's clock runs."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PICTURE, _DECODE = PictureConfig(), DecodeConfig()


@dataclass(frozen=True)
class DecodeRequest:
    """A file, or a time window of it in seconds from its first picture; and which of its clips."""

    path: str
    start_s: float | None = None
    end_s: float | None = None
    clip: int = 0


class Clip:
    """Decoded frames in a shared slot; `release` hands the slot back, and the frames with it."""

    def __init__(
        self,
        frames: np.ndarray,
        bucket: int,
        record: ClipRecord,
        *,
        decode_s: float,
        release: Callable[[], None],
    ) -> None:
        self.frames = frames
        """uint8 [F, H, W, 3]; empty after `release`."""
        self.bucket = bucket
        """Position of the clip's bucket in the config."""
        self.record = record
        self.decode_s = decode_s
        """Wall clock the child spent on it."""
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let another clip be decoded into this memory."""
        if self._release is not None:
            self._release()
            # A view of no frames would still keep their memory.
            self._release, self.frames = None, np.empty((0, *self.frames.shape[1:]), np.uint8)


class _Job:
    """One request on its way through a child."""

    def __init__(self, number: int, request: DecodeRequest, *, is_placing: bool, full: bool = False) -> None:
        self.number, self.request, self.is_placing, self.full = number, request, is_placing, full
        self.slot: int | None = None
        self.sent = self.started = 0.0
        self.begun = False
        """Whether the child said that it took it up."""
        self.crashes = 0
        self.asked = self.fatal = False
        """Whether a new child was asked if it may open the file; whether one said that the run must stop."""
        self.answer: Answer | None = None

    @property
    def is_alone(self) -> bool:
        """Whether a child gets it new, and nothing beside it."""
        return self.crashes > 0 or self.fatal

    def fail(self, reason: str, message: str) -> None:
        self.answer = Failed(id=self.number, error=reason, message=message)


def decode_settings(config: PreprocessConfig) -> dict[str, Any]:
    """What a run's config says to `DecoderProcess`, and to `decode_clip`: keyword arguments of both.

    Under `frames.clips = "whole"` the video encoder is asked for its frame rule; the result is plain values,
    to be made once and sent where clips are decoded.
    """
    names = ("frames", "buckets", "resize", "limits", "picture", "decode")
    settings = {name: getattr(config, name) for name in names}
    if config.frames.clips == "whole":
        settings["lengths"] = clip_lengths(
            config.buckets,
            load_video_encoder(config.video_encoder).geometry,
            frames=config.frames,
            target=config.target,
            text_length=config.text_encoder.max_length,
        )
    return settings


class DecoderProcess:
    """A decoder child and its slots, for one thread at a time; a context manager.

    The child dies with the thread that started it (the kernel's parent-death signal is per thread), so
    create and use it in threads that last.
    """

    def __init__(
        self,
        *,
        frames: FramesConfig,
        buckets: Sequence[BucketConfig],
        lengths: Sequence[Sequence[int]] | None = None,
        resize: ResizeConfig,
        limits: LimitsConfig,
        picture: PictureConfig = _PICTURE,
        decode: DecodeConfig = _DECODE,
        slots: int = 2,
        program: Sequence[str] = ("-m", "pipeline.sandbox_child"),
    ) -> None:
        """`lengths` as of a `Window`; unset, a clip has its bucket's num_frames.

        `slots`: clips held at once, being decoded or in the caller's hands. `program`: what the child's
        interpreter runs."""
        self._limits, self._program = limits, tuple(program)
        self._frames, self._buckets = frames, tuple(buckets)
        self._lengths = lengths or own_lengths(buckets)
        slot_bytes = max(bucket.num_frames * bucket.height * bucket.width * 3 for bucket in buckets)
        kind = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        self._slot_fds = [os.memfd_create("latentpress-frames", kind) for _ in range(slots)]
        for fd in self._slot_fds:
            os.ftruncate(fd, slot_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)  # reading past the end of a file ends the reader
        self._slots = [np.frombuffer(mmap.mmap(fd, slot_bytes), np.uint8) for fd in self._slot_fds]
        self._setup = {
            "frames": frames.model_dump_json(),
            "buckets": [bucket.model_dump_json() for bucket in buckets],
            "lengths": self._lengths,
            "resize": resize.model_dump_json(),
            "picture": picture.model_dump_json(),
            "decode": decode.model_dump_json(),
            "limits": limits.model_dump_json(),
            "slots": self._slot_fds,
            "slot_bytes": slot_bytes,
            "parent": os.getpid(),
            "keep_root": False,
            "ask": None,
        }
        self._failed_starts = 0
        self.protections: dict[str, str] = {}
        """What holds the child, or `not enforced` and why; empty until a child has started."""
        self._free = deque(range(slots))
        """The one used last is taken first: memory is only behind those that were ever used."""
        self._numbers = itertools.count()
        self._clips: deque[_Job] = deque()
        """Submitted and not yet asked for, in order."""
        self._waiting: deque[_Job] = deque()
        """Not yet given to the child."""
        self._sent: deque[_Job] = deque()
        """In the child's hands; it works on the first."""
        self._child: ChildProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child and drop every request; frames of clips not released stay readable."""
        self._kill()
        self._clips.clear()
        self._waiting.clear()
        for fd in self._slot_fds:
            os.close(fd)
        self._slot_fds.clear()

    def submit(self, request: DecodeRequest) -> None:
        """Ask for a clip; its decoding starts when a slot is free. Does not block."""
        job = _Job(next(self._numbers), request, is_placing=False)
        self._clips.append(job)
        self._waiting.append(job)
        self._feed()

    def result(self) -> Clip:
        """The clip submitted longest ago; ClipError if it cannot become a sample, RunError if the run
        must stop."""
        job = self._clips.popleft()
        answer = self._finish(job)
        slot = job.slot
        assert slot is not None
        assert isinstance(answer, DecodedAnswer)
        return Clip(
            self._slots[slot][: math.prod(answer.shape)].reshape(answer.shape),
            answer.bucket,
            answer.record,
            decode_s=answer.decode_s,
            release=lambda: self._free.appendleft(slot),
        )

    def place(self, request: DecodeRequest, *, full: bool = False) -> Placed:
        """What would become of a clip, without decoding it, or with `full` after decoding every picture of
        its window; ClipError where nothing would. `request.clip` plays no part."""
        job = _Job(next(self._numbers), request, is_placing=True, full=full)
        self._waiting.append(job)
        answer = self._finish(job)
        assert isinstance(answer, PlacedAnswer)
        return answer.placed

    def _finish(self, job: _Job) -> Answer:
        """Run the child until `job` is answered; raise what the answer says."""
        while job.answer is None:
            self._feed()
            if not self._sent:
                self._waiting.remove(job)
                raise RunError(
                    f"all {len(self._slots)} frame slots are in use: release a clip before the next"
                )
            self._listen()
        self._feed()
        if isinstance(job.answer, Failed):
            raise ClipError(job.answer.error, job.answer.message, attempts=min(2, job.crashes + 1))
        if isinstance(job.answer, Fatal):
            raise RunError(f"{job.request.path}: {job.answer.fatal}")
        return job.answer

    def _feed(self) -> None:
        """Give the child what it can take: one more job per free slot, a retried one alone."""
        for job in list(self._waiting):
            if self._sent and (job.is_alone or self._sent[0].is_alone):
                return
            if not job.is_placing:
                if not self._free:
                    continue
                job.slot = self._free.popleft()
            self._waiting.remove(job)
            if self._child is None:
                self._child = ChildProcess(self._program, self._setup, keep_open=self._slot_fds)
            self._sent.append(job)
            job.sent = job.started = time.monotonic()
            job.begun = False
            self._child.send({"id": job.number, "slot": job.slot, "full": job.full, **asdict(job.request)})

    def _listen(self) -> None:
        """Take one line from the child, or deal with its death, its slowness or its lies."""
        assert self._child is not None
        job = self._sent[0]
        timeout_s = self._limits.clip_timeout_s
        try:
            line = self._child.receive(job.started + timeout_s)
            if line is not None:
                self._heed(job, line)
                return
            died = None
        except TimeoutError:
            if not self._child.ready:
                raise RunError(f"the decoder process is not ready after {START_TIMEOUT_S} s") from None
            job.fail("timeout", f"decoding took more than limits.clip_timeout_s = {timeout_s} s")
            self._retire()
            return
        except BadAnswer as error:
            died = str(error)
        if not self._child.ready:
            self._failed_starts += 1
            if died or not self._child.was_killed or self._failed_starts == MAX_STARTS:
                raise RunError(f"the decoder process does not start: {died or self._child.epitaph()}")
        else:
            job.crashes += 1
            if job.crashes > 1:
                died = died or self._child.epitaph()
                job.fail("decoder_crash", f"the decoder died twice, the second time alone: {died}")
        self._retire()

    def _heed(self, job: _Job, line: bytes) -> None:
        """Do what a line of the child asks for; BadAnswer where it is not one that is due."""
        assert self._child is not None
        if not self._child.ready:
            self._welcome(job, parse(line, READY))
        elif not job.begun:
            at = parse(line, BEGUN).at
            if not job.sent <= at <= time.monotonic():
                raise BadAnswer("an impossible time")
            job.begun, job.started = True, min(at, job.started + BEGIN_S)
        else:
            self._accept(job, parse(line, PLACED if job.is_placing else DECODED))

    def _welcome(self, job: _Job, ready: Ready) -> None:
        """A child has started, and has not seen a file: what it says of itself is so."""
        assert self._child is not None
        self._child.ready, job.started = True, ready.at
        self._failed_starts = 0
        self.protections = ready.protections
        _tell_once({k: v for k, v in self.protections.items() if v.startswith(NOT_ENFORCED)})
        self._setup["ask"] = None
        if ready.fatal is not None:
            self._retire()
            raise RunError(ready.fatal)
        if ready.denied:
            self._setup["keep_root"] = True
            self._retire()

    def _accept(self, job: _Job, answer: Answer) -> None:
        """Take an answer that can be one to `job`; BadAnswer for another."""
        if answer.id != job.number:
            raise BadAnswer("an answer to another request")
        if isinstance(answer, DecodedAnswer):
            check_decoded(
                answer,
                clip=job.request.clip,
                buckets=self._buckets,
                lengths=self._lengths,
                limits=self._limits,
            )
        elif isinstance(answer, PlacedAnswer):
            check_placed(answer.placed, lengths=self._lengths, frames=self._frames, limits=self._limits)
        elif isinstance(answer, Fatal) and not job.fatal:
            job.fatal = True  # believed of a new child that is given nothing else
            self._retire()
            return
        elif isinstance(answer, Failed) and answer.denied and self._may_keep_root(job):
            job.asked, self._setup["ask"] = True, job.request.path
            self._retire()
            return
        self._sent.popleft()
        job.answer = answer
        if self._sent:
            self._sent[0].started = time.monotonic()
        if not isinstance(answer, DecodedAnswer):
            self._give_back(job)
        if isinstance(answer, Failed) and answer.error == "limit_memory":
            self._retire()

    def _may_keep_root(self, job: _Job) -> bool:
        """Whether a file that the child says it may not read could be only root's to read: of a mount that
        trusts no other user, as FUSE and NFS can be. A new child, that has seen no file, is asked then."""
        if job.asked or self._setup["keep_root"] or os.geteuid() != 0:
            return False
        return os.access(job.request.path, os.R_OK)

    def _retire(self) -> None:
        """End the child; what it had not answered waits again, in order."""
        self._kill()
        for job in reversed(self._sent):
            self._give_back(job)
            if job.answer is None:
                self._waiting.appendleft(job)
        self._sent.clear()

    def _give_back(self, job: _Job) -> None:
        if job.slot is not None:
            self._free.appendleft(job.slot)
            job.slot = None

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


_told: set[str] = set()


def _tell_once(missing: dict[str, str]) -> None:
    """Say what the sandbox cannot enforce here, once a process and reason."""
    for protection, why in missing.items():
        if (line := f"sandbox: {protection} {why}") not in _told:
            _told.add(line)
            print(f"{line} (docs/safety.md)", file=sys.stderr, flush=True)
