"""Decoders in Ray actors, on any node with a free core: rows in, frames through the object store out.

For clusters whose GPU nodes have too few cores. Each actor fetches and decodes what one worker asks it for,
in a sandboxed child like any other, and its frames are copied twice more than those of a child of the worker.
The worker owns its actors, which end with it. One that is gone is replaced, which is an incident and can take
until Ray has room; a clip that it held first is tried once more, alone, and fails as `decoder_crash` if that
takes an actor down again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray import exceptions

from pipeline.child_decoder import ChildDecoder, Row, listed
from pipeline.clip import ClipRecord
from pipeline.decoders import Note
from pipeline.fetch import Fetcher, Local
from pipeline.ray_join import first_sentence
from pipeline.sandbox import Clip
from schemas.config import LimitsConfig, PreprocessConfig, SourcesConfig
from schemas.errors import ClipError, RunError

DEATHS = 2
"""So many actors a clip may take down before it fails."""
_PLACED_S = 600.0
"""For Ray to place an actor in place of one that is gone."""
_SAY_EVERY_S = 30.0
"""That an actor is waited for."""
_TURNS = 12
"""Of `limits.clip_timeout_s`: what fetching and decoding a clip and those before it can take at most."""


@dataclass(frozen=True)
class Decoded:
    """A clip, as it travels."""

    frames: np.ndarray
    """uint8 [F, H, W, 3], in the object store."""
    bucket: int
    record: ClipRecord
    decode_s: float


class DecodeActor:
    """What runs on the other node."""

    def __init__(self, settings: dict[str, Any], sources: SourcesConfig, limits: LimitsConfig) -> None:
        self._decoder, self._fetcher = ChildDecoder(settings), Fetcher(sources, limits)
        self._clip: Clip | None = None

    def decode(self, row: Row) -> tuple[Decoded | ClipError, dict[str, str]]:
        """A row's clip, or why there is none; and what holds the child."""
        if self._clip is not None:
            self._clip.release()  # it is in the object store by now
        found: Decoded | ClipError
        try:
            self._decoder.submit(row, self._fetcher.local(row["path"], expect=listed(row)))
            self._clip = clip = self._decoder.result()
            found = Decoded(clip.frames, clip.bucket, clip.record, clip.decode_s)
        except ClipError as error:
            found = error
        return found, self._decoder.protections


@dataclass
class _Job:
    row: Row
    answer: Any = None
    """Future, once it is asked for."""
    deaths: int = 0


def start(
    count: int,
    settings: dict[str, Any],
    config: PreprocessConfig,
    *,
    note: Note,
    tell: Callable[[str], None],
) -> list[RemoteDecoder]:
    """So many actors, when all are placed."""
    started = [RemoteDecoder(settings, config, note=note, tell=tell) for _ in range(count)]
    ray.get([each.placed for each in started])
    return started


class RemoteDecoder:
    """One such actor, as the worker that owns it sees it."""

    def __init__(
        self,
        settings: dict[str, Any],
        config: PreprocessConfig,
        *,
        note: Note,
        tell: Callable[[str], None],
    ) -> None:
        self._limits, self._note, self._tell = config.limits, note, tell
        self._arguments = (settings, config.sources, config.limits)
        self._jobs: deque[_Job] = deque()
        self._unreleased = 0
        self.protections: dict[str, str] = {}
        self._start()

    @property
    def held(self) -> int:
        return len(self._jobs) + self._unreleased

    def submit(self, row: Row, local: Local) -> None:
        self._jobs.append(_Job(row))
        self._ask()

    def result(self) -> Clip:
        """RunError, or OSError and MemoryError, where it is not the clip that failed."""
        found = self._answer(self._jobs[0])
        self._jobs.popleft()
        self._ask()
        if isinstance(found, ClipError):
            raise found
        self._unreleased += 1
        return Clip(found.frames, found.bucket, found.record, decode_s=found.decode_s, release=self._released)

    def close(self) -> None:
        self._jobs.clear()
        ray.kill(self._actor)

    def _released(self) -> None:
        self._unreleased -= 1

    def _start(self) -> None:
        kind: Any = ray.remote(num_cpus=1)(DecodeActor)
        self._actor: Any = kind.remote(*self._arguments)
        self.placed: Any = self._actor.__ray_ready__.remote()

    def _ask(self) -> None:
        """Give the actor every job in order; one that took an actor down, alone."""
        for job in self._jobs:
            if job.answer is None:
                job.answer = self._actor.decode.remote(job.row)
            if job.deaths:
                return

    def _answer(self, job: _Job) -> Decoded | ClipError:
        """What becomes of the first job."""
        source = job.row["path"]
        while True:
            try:
                patience_s = _PLACED_S + _TURNS * self._limits.clip_timeout_s
                self._await(job.answer, patience_s)
                found, self.protections = ray.get(job.answer, timeout=0)
                return found
            except exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            except exceptions.OutOfMemoryError as error:
                raise MemoryError(f"Ray ended a decode actor for want of memory, over {source}") from error
            except exceptions.ObjectLostError as error:
                raise ConnectionError(f"the frames of {source} were lost with their node") from error
            except exceptions.GetTimeoutError as error:
                raise TimeoutError(
                    f"no decode actor answered over {source} in {patience_s:.0f} s; if the cluster has no "
                    "free core for one, lower executor.decode_actors"
                ) from error
            except exceptions.RayActorError as error:
                if getattr(error, "actor_init_failed", False):
                    raise RunError(f"a decode actor cannot start: {error}") from error
                job.deaths += 1
                died = first_sentence(error)
            for each in self._jobs:
                each.answer = None
            ray.kill(self._actor)
            self._start()
            self._note("decode_actor_died", f"a decode actor died over {source} and is replaced: {died}")
            if job.deaths == DEATHS:
                message = f"its decode actor died {DEATHS} times, the second time alone: {died}"
                return ClipError("decoder_crash", message, attempts=DEATHS)
            self._ask()

    def _await(self, answer: Any, patience_s: float) -> None:
        """Return when it is there, or after `patience_s`; meanwhile say what is waited for."""
        began = time.monotonic()
        while (waited := time.monotonic() - began) < patience_s:
            if ray.wait([answer], timeout=min(_SAY_EVERY_S, patience_s - waited))[0]:
                return
            if not ray.wait([self.placed], timeout=0)[0]:
                self._tell(
                    f"a worker has waited {time.monotonic() - began:.0f} s for Ray to find a free core for a "
                    "decode actor in place of one that died; add nodes, or lower executor.decode_actors"
                )
