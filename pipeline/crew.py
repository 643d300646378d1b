"""What a foreman and its crew say to each other: tasks one way, events the other.

A crew is workers numbered from 0, each running what it is given in order; `pipeline.executor` holds the one
of this process, `pipeline.ray_crew` the one of Ray actors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.generation import Unit
from pipeline.unit import UnitResult
from schemas.sample import FailureRecord


@dataclass(frozen=True, eq=False)
class Task:
    """What a worker is given: a unit to commit, or one row of it to be tried alone."""

    unit: Unit
    row: str | None = None
    """Key of the row that is tried alone; its outcome is thrown away."""
    condemned: Mapping[str, FailureRecord] = field(default_factory=dict)
    """Rows that are not to be touched, and the failure each becomes."""
    then: Unit | None = None
    """What its worker will most likely be given next, to be decoded ahead."""

    @property
    def name(self) -> str:
        unit = f"{self.unit.family} unit {self.unit.number}"
        if self.row is None:
            return unit
        row = next(row for row in self.unit.rows if row["key"] == self.row)
        return f"{row.get('source') or repr(row['caption'][:60])} of {unit}"


@dataclass(frozen=True)
class Ready:
    """A worker holds nothing and takes tasks."""

    worker: int


@dataclass(frozen=True)
class Finished:
    worker: int
    task: Task
    result: UnitResult | None
    """None for a row that was tried."""


@dataclass(frozen=True)
class Failed:
    """A task ended with an exception; its worker lives."""

    worker: int
    task: Task
    error: Exception


@dataclass(frozen=True)
class Died:
    """A worker is gone; one of the same number will say that it is `Ready`."""

    worker: int
    held: tuple[Task, ...]
    """In the order they were given: only the first had begun."""
    why: str
    starved: bool = False
    """Killed for want of memory, which is no fault of the row it held."""


Event = Ready | Finished | Failed | Died


class Crew(Protocol):
    """Workers that take tasks and report events."""

    name: str
    workers: int
    depth: int
    """Tasks a worker holds at once."""

    @property
    def gpu_names(self) -> list[str]:
        """Of the GPUs in use, each name once."""

    def give(self, worker: int, task: Task) -> None: ...

    def next(self, timeout_s: float | None) -> Event | None:
        """The next event; None after `timeout_s`."""

    def close(self) -> None: ...
