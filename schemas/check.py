"""Verification: every claim of a dataset held against its bytes. Repairs nothing, says what would.

Card, generations, commit records, shards (sha256, members, tensors), index and quarantine; each finding
names the file, the sample and a command that mends it. Works on a folder and on an object store alike.
Shards are read once, front to back, one per core. What is asked for is held as columns, the tables are
compared block by block with what commit records give, so memory does not grow with their rows otherwise.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from schemas.adoption import adoption_notes
from schemas.card import Card, card_bytes, card_path, read_card
from schemas.dataset import Dataset
from schemas.errors import DatasetError
from schemas.history import KEY, UNIT, History, column_numbers
from schemas.load import sealed_json
from schemas.sample import EMPTY_PROMPT_UNIT, Family, UnitCommit, unit_name
from schemas.shard_check import Problem, shard_problems
from schemas.table_check import table_problems
from schemas.verdict import Finding, Mending, Verdict

_GENERATION = re.compile(r"(\d{6,})\.parquet")
_WINDOW = 1024
"""Units whose results may wait in memory."""


def check_dataset(
    root: str | Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Verdict:
    """Check everything; DatasetError only where there is no readable card or manifest generation."""
    dataset, verdict = Dataset(root), Verdict()
    card = read_card(dataset.root)
    mend = Mending(dataset)
    verdict.rerun = mend.rerun
    if card_path(dataset.root).read_bytes() != card_bytes(card):
        verdict.findings.append(Finding("card.json", None, "is not spelled as it was written", None))
    try:
        verdict.notes += adoption_notes(dataset.root)
    except DatasetError as error:
        verdict.findings.append(Finding("adopted-*.json", None, str(error), None))
    history = dataset.history()
    verdict.findings += _missing_generations(dataset, history)
    done = dataset.finished()
    asked = {family: _Asked(history, family, card) for family in KEY}
    todo = [
        (family, int(unit)) for family in KEY for unit in np.union1d(done[family], asked[family].wanted_units)
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for start in range(0, len(todo), _WINDOW):
            window = todo[start : start + _WINDOW]
            results = pool.map(lambda item: _check_unit(dataset, card, asked[item[0]], item[1], mend), window)
            for number, unit in enumerate(results, start + 1):
                verdict.findings += unit.findings
                verdict.units += unit.committed
                verdict.unfinished += not unit.committed and not unit.findings
                verdict.nbytes += unit.nbytes
                if unit.family == "latents":
                    verdict.samples += unit.samples
                    verdict.quarantined += unit.quarantined
                else:
                    verdict.prompts += unit.samples
                    verdict.notes += unit.notes
                progress(number, len(todo))
    if not verdict.clean:
        verdict.notes.append("index and quarantine are compared with commit records once the rest is clean")
    tables = mend.rebuilt(dataset.index_path.name, dataset.quarantine_path.name)
    for path, sample, problem in table_problems(dataset, card, history, compare=verdict.clean):
        verdict.findings.append(Finding(path.name, sample, problem, tables))
    return verdict


def _missing_generations(dataset: Dataset, history: History) -> Iterator[Finding]:
    """Generations are numbered without gaps, and read up to the first that is not there."""
    folder = dataset.generation_path(0).parent
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    later = sum(_GENERATION.fullmatch(name) is not None for name in names) - history.generations
    if later > 0:
        name = dataset.generation_path(history.generations).relative_to(dataset.root).as_posix()
        yield Finding(name, None, f"is missing, and {later} later ones are there", None)


class _Asked:
    """What every unit of a family was ever asked to hold, from the generations."""

    def __init__(self, history: History, family: Family, card: Card) -> None:
        self.family, self._always = family, dict[int, dict[str, str]]()
        if family == "prompts":
            self._always[EMPTY_PROMPT_UNIT] = {card.empty_prompt: "the empty prompt"}
        self._keys, self._sources = history.table[KEY[family]], history.table["source"]
        added = np.flatnonzero(pc.equal(history.table["op"], "add").to_numpy())
        units = column_numbers(history.table, UNIT[family])
        self._all, self._all_units = _by_unit(added, units)
        self._live, self._live_units = _by_unit(history.live, units)
        self.next_unit = history.next_unit(family)
        self.wanted_units = np.union1d(self._live_units, list(self._always)).astype(np.int64)
        """Those that hold at least one live row, or the empty prompt."""

    def keys(self, unit: int) -> set[str]:
        """Every key that was put into a unit."""
        entries = self._entries(self._all, self._all_units, unit)
        return {*self._keys.take(entries).to_pylist(), *self._always.get(unit, ())}

    def wanted(self, unit: int) -> dict[str, str]:
        """The keys of a unit that live rows, or all datasets, ask for, and a source of each."""
        entries = self._entries(self._live, self._live_units, unit)
        rows = zip(self._keys.take(entries).to_pylist(), self._sources.take(entries).to_pylist(), strict=True)
        return self._always.get(unit, {}) | dict(rows)

    @staticmethod
    def _entries(entries: np.ndarray, units: np.ndarray, unit: int) -> np.ndarray:
        start, end = np.searchsorted(units, [unit, unit + 1])
        return entries[start:end]


def _by_unit(entries: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(entries in the order of their units, these units)."""
    order = entries[np.argsort(units[entries], kind="stable")]
    return order, units[order]


@dataclass
class _UnitResult:
    family: Family
    committed: bool = False
    samples: int = 0
    quarantined: int = 0
    nbytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _check_unit(dataset: Dataset, card: Card, asked: _Asked, unit: int, mend: Mending) -> _UnitResult:
    family, result = asked.family, _UnitResult(asked.family)
    path = dataset.commit_path(family, unit)
    record = path.relative_to(dataset.root).as_posix()
    # The tables go too: they may have copied what the record said.
    command = mend.rebuilt(record, dataset.index_path.name, dataset.quarantine_path.name)

    def add(file: str, problems: list[Problem], command: str | None) -> None:
        result.findings += [Finding(file, sample, problem, command) for sample, problem in problems]

    try:
        commit = dataset.commit(family, unit)
        is_exact = commit is None or path.read_bytes() == sealed_json(commit.model_dump(mode="json"))
    except DatasetError as error:
        add(record, [(None, str(error))], command)
        return result
    if commit is None:
        return result
    result.committed, result.nbytes = True, commit.nbytes
    if unit >= asked.next_unit:  # nothing is wrong with it, and its record is not to be deleted
        what = "is of a unit that no manifest generation names, so the newest generations are missing"
        add(record, [(None, what)], None)
        return result
    wanted = asked.wanted(unit)
    result.samples = sum(sample.key in wanted for sample in commit.samples)
    result.quarantined = sum(failure.key in wanted for failure in commit.quarantined)  # not those retried
    result.notes = [f"{wanted[f.key]}: {f.message}" for f in commit.quarantined if f.key in wanted]
    if not is_exact:
        add(record, [(None, "is not spelled as it was written")], command)
    add(record, _record_problems(commit, card, family, unit), command)
    add(record, _surplus(commit, asked.keys(unit)), command)
    held = {*(s.key for s in commit.samples), *(f.key for f in commit.quarantined)}
    lost = [(k, f"{source} is neither kept nor quarantined") for k, source in wanted.items() if k not in held]
    add(record, list(lost), mend.rerun)
    if commit.shard is not None:
        add(commit.shard, shard_problems(dataset.root / commit.shard, commit, card), command)
    return result


def _record_problems(commit: UnitCommit, card: Card, family: Family, unit: int) -> list[Problem]:
    problems: list[Problem] = []
    if commit.fingerprint != card.family_fingerprint(family):
        problems.append((None, "was made with other settings than the card says"))
    if (commit.family, commit.unit) != (family, unit):
        problems.append((None, f"claims to be {unit_name(commit.family, commit.unit)}"))
    if commit.samples and commit.shard is None:
        problems.append((None, "names samples but no shard"))
    return problems


def _surplus(commit: UnitCommit, asked: set[str]) -> list[Problem]:
    """Keys that a unit holds twice, or that nobody put into it."""
    counts = Counter([*(s.key for s in commit.samples), *(f.key for f in commit.quarantined)])
    return [
        *((key, f"is in it {count} times") for key, count in counts.items() if count > 1),
        *((key, "was never asked of this unit by any manifest generation") for key in counts.keys() - asked),
    ]
