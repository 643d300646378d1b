"""The failure policy on a crew of fakes: who is blamed for a death, what is tried again, when a run stops."""

from __future__ import annotations

import errno
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.crew import Died, Event, Failed, Finished, Ready, Task
from pipeline.foreman import DEATHS, FRUITLESS_DEATHS, RETRIES, Foreman
from pipeline.generation import Unit
from pipeline.unit import UnitResult
from schemas.errors import RunError


@dataclass(frozen=True)
class Death(Exception):
    """What a fake worker meets when it dies; `committed` where that was after the record was made."""

    why: str = "signal SIGSEGV"
    starved: bool = False
    committed: bool = False


Fate = Callable[[int, Task], Exception | None]
"""(worker, task) -> what happens to it."""


class FakeCrew:
    """Workers whose tasks end as `fate` says, in an order drawn from `seed`; `store` is what is committed."""

    name = "fake"
    gpu_names: list[str] = []  # noqa: RUF012

    def __init__(self, fate: Fate, *, workers: int = 1, depth: int = 2, seed: int = 0) -> None:
        self.workers, self.depth, self._fate = workers, depth, fate
        self.store: dict[int, UnitResult] = {}
        self.began: list[Task] = []
        self._random = random.Random(seed)
        self._held: dict[int, deque[Task]] = {}
        self._starting = list(range(workers))

    def give(self, worker: int, task: Task) -> None:
        self._held[worker].append(task)
        assert len(self._held[worker]) <= self.depth

    def next(self, timeout_s: float | None) -> Event | None:
        busy = [worker for worker, held in self._held.items() if held]
        if not self._starting and not busy:
            assert timeout_s is not None, "the foreman waits for an event that cannot come"
            return None
        worker = self._random.choice([*self._starting, *busy])
        if worker in self._starting:
            self._starting.remove(worker)
            self._held[worker] = deque()
            return Ready(worker)
        task = self._held[worker][0]
        self.began.append(task)
        error = self._fate(worker, task)
        if error is None or (isinstance(error, Death) and error.committed):
            result = self._run(task)
        if isinstance(error, Death):
            self._starting.append(worker)
            return Died(worker, tuple(self._held.pop(worker)), error.why, starved=error.starved)
        self._held[worker].popleft()
        return Failed(worker, task, error) if error else Finished(worker, task, result)

    def close(self) -> None:
        pass

    def _run(self, task: Task) -> UnitResult | None:
        if task.row is not None:
            return None
        return self.store.setdefault(task.unit.number, result_for(task))


class LosingCrew(FakeCrew):
    """An answer is lost with its worker where the task behind it kills that at once."""

    def next(self, timeout_s: float | None) -> Event | None:
        for worker, held in self._held.items():
            if len(held) > 1 and isinstance(self._fate(worker, held[1]), Death):
                if self._fate(worker, held[0]) is None:
                    self._run(held[0])
                self._starting.append(worker)
                return Died(worker, tuple(self._held.pop(worker)), "signal SIGSEGV")
        return super().next(timeout_s)


def result_for(task: Task, *, ours: bool = True) -> UnitResult:
    failures = tuple((record.reason, key) for key, record in task.condemned.items())
    kept = len(task.unit.rows) - len(failures)
    return UnitResult("latents", task.unit.number, kept, failures, 0.0, 0, {}, ours=ours)


def units(count: int, *, rows: int = 3) -> list[Unit]:
    return [
        Unit("latents", n, tuple({"key": f"{n}.{i}", "source": f"{n}.{i}.mp4"} for i in range(rows)))
        for n in range(count)
    ]


class Run:
    """A foreman on a fake crew, and what it reported."""

    def __init__(self, crew: FakeCrew) -> None:
        self.crew, self.notes = crew, Counter[str]()

    def __call__(self, work: list[Unit]) -> dict[int, UnitResult]:
        foreman = Foreman(
            self.crew, found=lambda unit: self.crew.store.get(unit.number), note=self._note, backoff_s=0.0
        )
        results = list(foreman.run(work))
        assert Counter(result.unit for result in results) == Counter(unit.number for unit in work)
        return {result.unit: result for result in results}

    def _note(self, kind: str, sentence: str, family: str | None) -> None:
        assert sentence
        self.notes[kind] += 1


def dies_over(*keys: str) -> Fate:
    """Every task that touches one of these rows kills its worker."""

    def fate(worker: int, task: Task) -> Exception | None:
        touched = {task.row} if task.row else {row["key"] for row in task.unit.rows} - set(task.condemned)
        return Death() if touched & set(keys) else None

    return fate


def dies_the_first_times(number: int, times: int, death: Death) -> Fate:
    left = [times]

    def fate(worker: int, task: Task) -> Exception | None:
        if task.unit.number != number or left[0] == 0:
            return None
        left[0] -= 1
        return death

    return fate


def fails_the_first_times(times: int, error: Exception) -> Fate:
    left = [times]

    def fate(worker: int, task: Task) -> Exception | None:
        if left[0] == 0:
            return None
        left[0] -= 1
        return error

    return fate


def test_the_row_that_kills_its_worker_alone_is_condemned_and_its_neighbours_are_kept() -> None:
    run = Run(FakeCrew(dies_over("1.1")))
    results = run(units(4))
    assert results[1].failures == (("worker_crash", "1.1"),)
    assert [results[n].kept for n in range(4)] == [3, 2, 3, 3]
    assert run.notes == {"worker_died": 2 * DEATHS, "unit_isolated": 1, "row_condemned": 1}
    record = next(task for task in run.crew.began if task.condemned).condemned["1.1"]
    assert (record.key, record.attempts) == ("1.1", DEATHS)
    assert "SIGSEGV" in record.message


def test_one_death_of_a_unit_is_no_verdict() -> None:
    run = Run(FakeCrew(dies_the_first_times(1, 1, Death())))
    assert all(not result.failures for result in run(units(3)).values())
    assert run.notes == {"worker_died": 1}


def test_rows_tried_alone_after_two_accidents_are_all_kept() -> None:
    run = Run(FakeCrew(dies_the_first_times(1, DEATHS, Death())))
    assert all(result.kept == 3 for result in run(units(3)).values())
    assert sum(task.row is not None for task in run.crew.began) == 3


def test_the_unit_that_was_queued_is_never_blamed() -> None:
    """Unit 0 dies over and over with unit 1 in the same worker's hands."""
    run = Run(FakeCrew(dies_over("0.0", "0.1")))
    results = run(units(2))
    assert results[1].kept == 3
    assert all(task.unit.number == 0 for task in run.crew.began if task.row)
    assert [task.unit.number for task in run.crew.began].count(1) == 1


def test_what_a_worker_died_over_goes_to_another_one() -> None:
    """A worker on a bad machine must not condemn rows that run well elsewhere."""
    bad = FakeCrew(lambda worker, task: Death() if worker == 0 else None, workers=2, depth=1)
    tried: list[tuple[int, str | None]] = []
    fate = bad._fate
    bad._fate = lambda worker, task: tried.append((worker, task.name)) or fate(worker, task)  # type: ignore[func-returns-value]
    run = Run(bad)
    assert all(result.kept == 3 for result in run(units(4)).values())
    assert "unit_isolated" not in run.notes
    assert all(count == 1 for (worker, _), count in Counter(tried).items() if worker == 0)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_worker_that_dies_over_every_row_stops_the_run_with_what_to_lower(rows: int) -> None:
    run = Run(FakeCrew(dies_over(*(row["key"] for unit in units(20, rows=rows) for row in unit.rows))))
    with pytest.raises(RunError, match=r"worker 0 died over 5 different .*SIGSEGV.*lower executor\.workers"):
        run(units(20, rows=rows))
    assert run.notes["worker_died"] <= DEATHS * FRUITLESS_DEATHS
    assert run.notes["row_condemned"] <= FRUITLESS_DEATHS - 2


def test_a_unit_that_dies_although_no_row_does_stops_the_run() -> None:
    run = Run(FakeCrew(lambda worker, task: None if task.row else Death()))
    with pytest.raises(RunError, match="although no row of it does so alone"):
        run(units(1))


def test_a_caption_that_kills_its_worker_stops_the_run_and_is_named() -> None:
    unit = Unit("prompts", 1, ({"key": "0.0", "caption": "harmless"}, {"key": "0.1", "caption": "deadly"}))
    with pytest.raises(RunError, match=r"'deadly' of prompts unit 1.*Remove or change that caption"):
        Run(FakeCrew(dies_over("0.1")))([unit])


@pytest.mark.parametrize(("first", "named"), [(0, "the empty caption"), (1, "the first of this run")])
def test_a_text_encoder_that_dies_over_everything_is_not_blamed_on_a_caption(first: int, named: str) -> None:
    work = [Unit("prompts", n, ({"key": f"{n}", "caption": "x" * n},)) for n in range(first, 4)]
    with pytest.raises(
        RunError, match=rf"{named}: .*the text encoder itself dies.*lower executor\.workers"
    ) as told:
        Run(FakeCrew(lambda worker, task: Death()))(work)
    assert "Remove" not in str(told.value)


def test_an_answer_lost_after_the_commit_costs_nothing() -> None:
    run = Run(FakeCrew(dies_the_first_times(0, 1, Death(committed=True))))
    results = run(units(2))
    assert [task.unit.number for task in run.crew.began] == [0, 1]
    assert all(result.kept == 3 for result in results.values())


def test_after_a_lost_answer_the_next_unit_is_not_blamed() -> None:
    """Whether it had begun is not known."""
    after_its_record = {0: Death(committed=True), 2: Death(committed=True)}
    run = Run(FakeCrew(lambda worker, task: after_its_record.pop(task.unit.number, None)))
    assert all(result.kept == 3 for result in run(units(4)).values())
    assert run.notes == {"worker_died": 2}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_whose_answer_is_lost_is_not_condemned_for_the_next_one(workers: int) -> None:
    run = Run(LosingCrew(dies_over("1.1"), workers=workers))
    results = run(units(4))
    assert results[1].failures == (("worker_crash", "1.1"),)
    assert sum(result.kept for result in results.values()) == 11


def test_want_of_memory_condemns_nobody() -> None:
    run = Run(FakeCrew(dies_the_first_times(1, RETRIES, Death("memory", starved=True))))
    assert all(result.kept == 3 for result in run(units(3)).values())
    assert run.notes == {"worker_died": RETRIES}
    greedy = Run(FakeCrew(lambda worker, task: Death(starved=True) if task.unit.number == 0 else None))
    with pytest.raises(RunError, match=r"unit 0 ran out of memory 4 times.*run the same command again"):
        greedy(units(3))


STARVED = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
]


@pytest.mark.parametrize("error", STARVED)
def test_want_of_memory_says_what_to_lower(error: Exception) -> None:
    with pytest.raises(RunError, match=r"lower executor\.workers"):
        Run(FakeCrew(fails_the_first_times(RETRIES + 1, error)))(units(1))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), TimeoutError("slow"), *STARVED])
def test_what_may_pass_is_tried_again_and_then_stops_the_run(error: Exception) -> None:
    run = Run(FakeCrew(fails_the_first_times(RETRIES, error)))
    assert all(result.kept == 3 for result in run(units(1)).values())
    assert run.notes == {"retried": RETRIES}
    with pytest.raises(RunError, match=r"unit 0 failed.*run the same command again"):
        Run(FakeCrew(fails_the_first_times(RETRIES + 1, error)))(units(1))


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "the disk is full at /data/out"),
        (errno.EDQUOT, "the disk quota is used up at /data/out"),
        (errno.EROFS, "the file system is read-only at /data/out"),
    ],
)
def test_what_does_not_pass_stops_the_run_at_once(code: int, sentence: str) -> None:
    run = Run(FakeCrew(fails_the_first_times(1, OSError(code, "as the system says", "/data/out"))))
    with pytest.raises(RunError, match=f"{sentence}.*run the same command again"):
        run(units(3))
    assert not run.notes


def test_an_error_of_our_own_is_shown_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        Run(FakeCrew(fails_the_first_times(1, ZeroDivisionError())))(units(1))


def test_units_that_another_driver_commits_are_not_run_again() -> None:
    work = units(200, rows=1)
    crew = FakeCrew(lambda worker, task: None, depth=1)
    theirs = iter(work)  # a second driver in step with this one, in order

    def fate(worker: int, task: Task) -> Exception | None:
        for unit in theirs:
            if unit.number not in crew.store:
                crew.store[unit.number] = result_for(Task(unit), ours=False)
                break
        return None

    crew._fate = fate
    Run(crew)(work)
    doubled = len(crew.began) + sum(not result.ours for result in crew.store.values()) - len(work)
    assert len(crew.began) < 150
    assert doubled < 20


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_is_told_what_it_will_get_next(workers: int, depth: int) -> None:
    crew = FakeCrew(lambda worker, task: None, workers=workers, depth=depth)
    given: dict[int, list[Task]] = {worker: [] for worker in range(workers)}
    give = crew.give

    def noted(worker: int, task: Task) -> None:
        given[worker].append(task)
        give(worker, task)

    crew.give = noted  # type: ignore[method-assign]
    Run(crew)(units(40))
    hints = [
        (told.then, got.unit)
        for tasks in given.values()
        for told, got in itertools.pairwise(tasks)
        if told.then
    ]
    assert len(hints) >= 40 - 2 * workers - workers * depth
    wrong = sum(then is not got for then, got in hints)
    assert wrong == 0 if workers == 1 else wrong <= workers, "only at the end, where work is shared out"
    assert all(tasks[-1].then is None or workers > 1 for tasks in given.values())


def test_a_unit_that_comes_between_leaves_the_promise_standing() -> None:
    run = Run(FakeCrew(dies_over("1.1"), depth=1))
    run(units(6))
    fresh = [task.unit.number for task in run.crew.began if task.row is None and not task.condemned]
    assert fresh == [0, 1, 1, 2, 3, 4, 5]
    assert all(task.then is None for task in run.crew.began if task.row is not None)
    again = next(task for task in run.crew.began if task.condemned)
    assert again.then is not None
    assert again.then.number == 2


@given(
    poison=st.sets(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=3),
    kills=st.sets(st.integers(0, 60), max_size=8),
    faults=st.sets(st.integers(0, 60), max_size=3),
    workers=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_every_unit_ends_once_and_only_poison_is_lost(
    poison: set[tuple[int, int]], kills: set[int], faults: set[int], workers: int, seed: int
) -> None:
    """Random kills may stop a run, which the next one then finishes; they never lose a row by themselves
    unless they hit the same row twice while it is alone."""
    keys = {f"{unit}.{row}" for unit, row in poison}
    step = 0
    alone: Counter[str | None] = Counter()

    def fate(worker: int, task: Task) -> Exception | None:
        nonlocal step
        step += 1
        poisoned = dies_over(*keys)(worker, task)
        if step in kills:
            alone[task.row] += 1
            return Death("signal SIGKILL", committed=poisoned is None and step % 2 == 0)
        return OSError(errno.EIO, "I/O error") if step in faults else poisoned

    crew = FakeCrew(fate, workers=workers, seed=seed)
    work = units(10, rows=4)
    for _ in range(20):  # the same command again
        try:
            Run(crew)([unit for unit in work if unit.number not in crew.store])
        except RunError:
            crew._held.clear()
            crew._starting = list(range(workers))
        else:
            break
    assert set(crew.store) == set(range(10))
    lost = {source for result in crew.store.values() for _, source in result.failures}
    unlucky = {key for key in alone if key}
    assert lost - unlucky == keys - unlucky
    assert sum(result.kept for result in crew.store.values()) == 40 - len(lost)
