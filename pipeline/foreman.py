"""Who gets which unit, and what follows when that goes wrong: the failure policy, whole and without Ray.

In: units, and a crew whose workers take tasks and report events. Out: the result of every unit, each once.
A worker that dies is blamed on the task it was running, never on the ones queued behind it:

    unit's worker dies twice     -> its rows are tried alone; one that kills its worker alone, twice,
                                    becomes a `worker_crash` failure in the unit's commit
    worker dies over five tasks  -> with nothing finished in between: the run stops, it is the machine
                                    or the settings
    transient error              -> tried again with growing pauses, then the run stops
    disk full, read-only         -> the run stops at once

A stopped run loses nothing: its committed units stay, and the next run begins with the others. Nothing is
kept here that a next run needs, so deaths are counted anew by each run.
"""

from __future__ import annotations

import dataclasses
import errno
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.crew import Crew, Died, Failed, Finished, Ready, Task
from pipeline.generation import Unit
from pipeline.starved import EncoderStarved, is_starved
from pipeline.unit import UnitResult
from schemas.errors import LatentpressError, RunError
from schemas.sample import EMPTY_PROMPT_UNIT, FailureRecord, Family

DEATHS = 2
"""So often a unit may take its worker down before its rows are tried alone, and a row before it fails."""
FRUITLESS_DEATHS = 5
"""So many different tasks a worker may die over with nothing finished in between."""
RETRIES = 3
"""After an error that may pass."""
BACKOFF_S = 1.0
"""Before the first retry; four times as long before each later one."""
STOPS_AT_ONCE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
}
"""Errors that do not pass by themselves."""
RESUMES = "What is committed stays; run the same command again"


_Key = tuple[Family, int, str | None]
"""A task: the family and number of its unit, and the row it is about."""


@dataclass
class _Trial:
    """A unit whose rows are tried alone."""

    unit: Unit
    left: set[str]
    condemned: dict[str, FailureRecord] = field(default_factory=dict)


class Foreman:
    """Runs units on a crew under the failure policy."""

    def __init__(
        self,
        crew: Crew,
        *,
        found: Callable[[Unit], UnitResult | None],
        note: Callable[[str, str, Family | None], None],
        where: str = "",
        backoff_s: float = BACKOFF_S,
    ) -> None:
        """`found` gives the result of a unit that is committed; `note` takes (kind, sentence, family)
        of every incident: `retried`, `worker_died`, `unit_isolated`, `row_condemned`, and what gave way in a
        task that failed; `where` is written to."""
        self.name, self.workers = crew.name, crew.workers
        self._crew, self._found, self._note = crew, found, note
        self._where, self._backoff_s = where, backoff_s
        self._free: dict[int, int] = {}
        """Tasks that each worker there is can still take."""
        self._fruitless: defaultdict[int, set[object]] = defaultdict(set)
        """What each worker died over since it last finished something."""

    @property
    def gpu_names(self) -> list[str]:
        """Of the GPUs in use."""
        return self._crew.gpu_names

    def run(self, units: Sequence[Unit]) -> Iterator[UnitResult]:
        """Every unit's result once, in the order they come in; RunError where the run must stop."""
        self._units = units
        self._fresh = [*range(len(units))][::-1]
        """Places in `units`, which may describe a unit only when it is taken."""
        self._reserved: dict[int, Unit] = {}
        """The fresh unit that each worker was told it will get next."""
        self._todo: deque[Task] = deque()
        """What is to be done before any fresh unit."""
        self._later: list[tuple[float, Task]] = []
        self._flying = 0
        self._trials: dict[_Key, _Trial] = {}
        self._deaths: Counter[tuple[_Key, bool]] = Counter()
        self._starved: Counter[_Key] = Counter()
        self._failures: Counter[_Key] = Counter()
        self._shunned: dict[_Key, int] = {}
        self._alone = True
        self._text_lives = False
        """A worker finished something with the text encoder."""
        while True:
            yield from self._hand_out()
            if not (self._fresh or self._reserved or self._todo or self._later or self._flying):
                return
            pause = max(0.0, min(when for when, _ in self._later) - time.monotonic()) if self._later else None
            match self._crew.next(pause):
                case Ready(worker):
                    self._free[worker] = self._crew.depth
                case Finished(worker, task, result):
                    self._returned(worker, task)
                    if task.unit.family == "prompts":
                        self._text_lives = True
                    if result is None or result.kept or not task.condemned:
                        self._fruitless.pop(worker, None)
                    if result is None:
                        self._tried(task)
                    else:
                        self._share(result)
                        yield result
                case Failed(worker, task, error):
                    self._returned(worker, task)
                    self._try_later(task, error)
                case Died() as death:
                    self._free.pop(death.worker, None)
                    self._flying -= len(death.held)
                    yield from self._bury(death)

    def close(self) -> None:
        self._crew.close()

    def _returned(self, worker: int, task: Task) -> None:
        self._free[worker] += self._room_for(task)
        self._flying -= 1

    def _room_for(self, task: Task) -> int:
        """A row that is tried has its worker to itself: behind another one it would not be known which of
        them a death was over, since an answer can be lost with the worker that gave it."""
        return 1 if task.row is None else self._crew.depth

    def _hand_out(self) -> Iterator[UnitResult]:
        """Give every worker what it can take; the results of units that turn out to be committed."""
        now = time.monotonic()
        self._todo.extend(task for when, task in self._later if when <= now)
        self._later = [(when, task) for when, task in self._later if when > now]
        while (chosen := self._choose()) is not None:
            worker, task = chosen
            # Another driver, or a worker whose answer was lost, may have been here.
            if task.row is None and (result := self._found(task.unit)) is not None:
                self._share(result)
                yield result
                continue
            self._free[worker] -= self._room_for(task)
            self._flying += 1
            self._crew.give(worker, self._with_hint(worker, task))

    def _choose(self) -> tuple[int, Task] | None:
        """The first task that a worker can take, taken off its list, and the worker with most room.

        What a worker died over goes to another where there is one: two deaths shall be two witnesses.
        """
        for worker in sorted(self._free, key=lambda worker: -self._free[worker]):
            if self._free[worker] == 0:
                return None
            for i, task in enumerate(self._todo):
                if len(self._free) > 1 and self._shunned.get(_key(task)) == worker:
                    continue
                if self._free[worker] < self._room_for(task):
                    break  # this worker waits until it is idle
                del self._todo[i]
                return worker, task
            else:
                if (unit := self._fresh_unit(worker)) is not None:
                    return worker, Task(unit)
        return None

    def _fresh_unit(self, worker: int) -> Unit | None:
        """What the worker was promised, else one that nobody was, else what another one was."""
        if worker not in self._reserved and self._fresh:
            return self._units[self._fresh.pop()]
        promised = worker if worker in self._reserved else next(iter(self._reserved), None)
        return None if promised is None else self._reserved.pop(promised)

    def _with_hint(self, worker: int, task: Task) -> Task:
        """A unit with the one to decode ahead of, which stays reserved for this worker while others have
        work. What comes between, a row tried alone or a unit tried again, makes the hint wrong: that costs
        the worker a few clips decoded in vain."""
        if task.row is not None:
            return task
        if worker not in self._reserved and self._fresh:
            self._reserved[worker] = self._units[self._fresh.pop()]
        return dataclasses.replace(task, then=self._reserved.get(worker))

    def _share(self, result: UnitResult) -> None:
        """Where another driver is at work, leave its order, so that the two seldom run the same unit."""
        if not result.ours and self._alone:
            self._alone = False
            random.shuffle(self._fresh)

    def _try_later(self, task: Task, error: Exception) -> None:
        for kind, sentence in getattr(error, "incidents", ()):
            self._note(kind, sentence, task.unit.family)
        if isinstance(error, LatentpressError):
            raise error
        if not is_starved(error) and not isinstance(error, OSError):
            raise error
        self._failures[_key(task)] += 1
        count = self._failures[_key(task)]
        if count > RETRIES or (isinstance(error, OSError) and error.errno in STOPS_AT_ONCE):
            raise stopped(f"{task.name} failed", error, where=self._where) from error
        self._note("retried", f"{task.name}: {error or type(error).__name__}", task.unit.family)
        self._later.append((time.monotonic() + self._backoff_s * 4 ** (count - 1), task))

    def _bury(self, death: Died) -> Iterator[UnitResult]:
        lost = deque(death.held)
        while lost and lost[0].row is None and (result := self._found(lost[0].unit)) is not None:
            lost.popleft()  # committed: only its answer was lost
            yield result
        # Where the first was committed, whether the next had begun is not known.
        culprit = lost.popleft() if len(lost) == len(death.held) > 0 else None
        self._todo.extendleft(reversed(lost))
        over = culprit.name if culprit else "nothing: it was starting or idle"
        family = culprit.unit.family if culprit else None
        self._note("worker_died", f"worker {death.worker}, over {over}: {death.why}", family)

        fruitless = self._fruitless[death.worker]
        fruitless.add(_key(culprit) if culprit and not death.starved else object())
        if len(fruitless) >= FRUITLESS_DEATHS:
            raise RunError(
                f"worker {death.worker} died over {FRUITLESS_DEATHS} different tasks, the last {over}, and "
                f"finished nothing in between: {death.why}. That is the machine or the settings, not the "
                f"rows: {_LOWER}. {RESUMES}"
            )
        if culprit is not None:
            self._shunned[_key(culprit)] = death.worker
            self._blame(culprit, death)

    def _blame(self, task: Task, death: Died) -> None:
        unit = task.unit
        whole: _Key = (unit.family, unit.number, None)
        if death.starved:
            self._starved[_key(task)] += 1
            if self._starved[_key(task)] > RETRIES:
                raise RunError(f"{task.name} ran out of memory {RETRIES + 1} times: {_LOWER}. {RESUMES}")
            self._todo.append(task)
            return
        self._deaths[_key(task), whole in self._trials] += 1
        deaths = self._deaths[_key(task), whole in self._trials]
        if deaths < DEATHS:
            self._todo.appendleft(task)
        elif task.row is not None:
            message = f"the worker died {DEATHS} times while it held this row alone: {death.why}"
            if unit.family == "prompts" and (unit.number == EMPTY_PROMPT_UNIT or not self._text_lives):
                first = "the empty caption" if unit.number == EMPTY_PROMPT_UNIT else "the first of this run"
                raise RunError(
                    f"{task.name}, {first}: {message}. Most likely the text encoder itself dies here, "
                    f"whatever the caption: {_TEXT}. {RESUMES}"
                )
            if unit.family == "prompts":  # a caption belongs to many rows, and none can do without
                raise RunError(f"{task.name}: {message}. Remove or change that caption. {RESUMES}")
            self._note("row_condemned", f"{task.name}: {message}", unit.family)
            self._trials[whole].condemned[task.row] = FailureRecord(
                key=task.row, stage="encode", reason="worker_crash", message=message, attempts=DEATHS
            )
            self._tried(task)
        elif whole not in self._trials:
            self._note("unit_isolated", f"{task.name}: its rows are tried alone", unit.family)
            keys = [row["key"] for row in unit.rows]
            self._trials[whole] = _Trial(unit, set(keys))
            self._todo.extendleft(Task(unit, row=key) for key in reversed(keys))
        else:
            raise RunError(
                f"{task.name} killed its worker again although no row of it does so alone: {death.why}. "
                f"{_LOWER}, or units.rows in a new dataset. {RESUMES}"
            )

    def _tried(self, task: Task) -> None:
        """A row's trial is over; after the last, the unit runs without those condemned."""
        assert task.row is not None
        trial = self._trials[task.unit.family, task.unit.number, None]
        trial.left.discard(task.row)
        if not trial.left:
            self._todo.appendleft(Task(trial.unit, condemned=trial.condemned))


_TEXT = (
    "lower executor.workers, where memory may be short, or take text_encoder.compute_dtype = 'bfloat16' in a "
    "new dataset; else see that the files of text_encoder.model are whole"
)
_LOWER = "Out of memory is the usual cause; lower executor.workers, limits.memory_bytes or the buckets"


def _key(task: Task) -> _Key:
    return task.unit.family, task.unit.number, task.row


def stopped(what: str, error: BaseException, *, where: str = "") -> RunError:
    """The sentence a run ends with over an error that is no clip's fault."""
    if isinstance(error, EncoderStarved):  # it says itself what to do
        return RunError(f"{what}: {error}. {RESUMES}")
    if not isinstance(error, OSError) or is_starved(error):
        return RunError(f"{what}: {error or type(error).__name__}. {_LOWER}. {RESUMES}")
    place = error.filename or where
    cause = STOPS_AT_ONCE.get(error.errno or 0) or error.strerror or str(error)
    return RunError(
        f"{what}: {cause}{f' at {place}' if place else ''}. What is committed stays; mend that and run the "
        "same command again"
    )
