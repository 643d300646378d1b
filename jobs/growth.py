"""What a plan says of a dataset that is there already: what changed and what runs for it, or why it is stale.

In: the card and the rows that a config asks for. Out: counts, causes, and a sentence for each. A plan reads
the files that the dataset knows where their size or time is another, and those it has never seen where they
are as long as one that is asked for no more, which may have been renamed; others are new without being read.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jobs.console import console, count_of
from pipeline.changes import Changes, find_changes
from pipeline.clip import Placed
from pipeline.fetch import Fetcher
from pipeline.generation import known_sources, split_into_clips
from pipeline.outlook import outlook
from pipeline.source import Source, identify
from schemas.adoption import adoption_record, difference_lines, may_be_adopted, unsettled
from schemas.card import Card
from schemas.config import PreprocessConfig
from schemas.dataset import Dataset
from schemas.errors import ClipError, DatasetError
from schemas.history import History
from schemas.index import read_quarantine
from schemas.manifest import ManifestRow
from schemas.sample import Family
from schemas.store import is_url

_NOUN: dict[Family, str] = {"latents": "clip", "prompts": "caption"}


class Growth:
    """The rows of a manifest, held against their dataset; `card` is that of the dataset."""

    def __init__(
        self,
        dataset: Dataset,
        card: Card,
        config: PreprocessConfig,
        rows: Sequence[ManifestRow],
        looked: Mapping[int, Placed | ClipError],
    ) -> None:
        """`looked`: what a look at each row found, by its number."""
        before = dataset.history()
        sources = _sources(rows, config, before)
        clips = split_into_clips(
            rows,
            config,
            history=before,
            sources=sources,
            look=lambda new, _: ((row, looked[row.number]) for row in new),
        )
        self._dataset, self._clips, self._looked = dataset, clips, looked
        self._changes: Changes = find_changes(
            dataset, card, rows=clips, sources=sources, unit_rows=config.units.rows, history=before
        )
        after = before.with_generation(self._changes.table)
        self.outlook = outlook(dataset, self._changes, rows=len(rows), before=before, after=after)
        finished = dataset.finished()
        self._latents_done = np.isin(self._changes.unit, finished["latents"])
        self._prompts_done = np.isin(self._changes.prompt_unit, finished["prompts"])

    def done(self) -> tuple[int, int]:
        """How many of the clips that can be made are committed, and how many of these are quarantined."""
        chosen = [not isinstance(self._looked[clip.number], ClipError) for clip in self._clips]
        done = self._latents_done & self._prompts_done & np.array(chosen)
        try:
            failed = read_quarantine(
                self._dataset.root, columns=["source", "start_s", "end_s", "clip", "caption"]
            )
        except DatasetError:
            return int(done.sum()), 0
        keys = {tuple(row.values()) for row in failed.to_pylist()}
        clips = (self._clips[i] for i in np.flatnonzero(done).tolist())
        return int(done.sum()), sum((c.source, c.start_s, c.end_s, c.clip, c.caption) in keys for c in clips)

    def stale(self) -> list[dict[str, Any]]:
        """Every row, but for new ones, that is not what the dataset holds: why, and what runs for it."""
        found: dict[int, tuple[str, str]] = {}
        runs: dict[int, set[str]] = defaultdict(set)
        for i, (clip, cause) in enumerate(zip(self._clips, self._changes.cause, strict=True)):
            if cause not in ("", "new"):
                found.setdefault(clip.number, (clip.source, cause))
                runs[clip.number] |= {"latents"} if not self._latents_done[i] else set()
                runs[clip.number] |= {"prompts"} if not self._prompts_done[i] else set()
        return [
            {"row": row, "source": source, "cause": cause, "runs": _told(runs[row])}
            for row, (source, cause) in found.items()
        ]


def _told(runs: set[str]) -> str:
    return "prompts only" if runs == {"prompts"} else " and ".join(sorted(runs)) or "nothing runs"


def _sources(rows: Sequence[ManifestRow], config: PreprocessConfig, history: History) -> dict[str, Source]:
    known = known_sources(history)
    seen = {path for path, _, _ in known}
    paths = dict.fromkeys(row.path for row in rows)
    live = history.live_table(["path", "size"])
    gone = {row["size"] for row in live.to_pylist() if row["path"] not in paths}
    read = [path for path in paths if path in seen or (gone and _length(path) in gone)]
    sources = {path: Source(f"unread:{path}", 0, 0) for path in paths}
    fetcher = Fetcher(config.sources, config.limits)
    return sources | identify(read, mode=config.identity, known=known, limits=config.limits, fetcher=fetcher)


def _length(path: str) -> int | None:
    """Bytes of a local file that is there."""
    try:
        return None if is_url(path) else os.stat(path).st_size
    except OSError:
        return None


def other_settings(dataset: Dataset, *, have: Card, want: Card, adopt: bool) -> dict[str, Any]:
    """Family -> what differs from the dataset and how much of it that concerns; empty where nothing does,
    or where all of it may be adopted and is to be. StaleDatasetError where it is to be and may not."""
    differences = unsettled(dataset.root, have=have, want=want)
    if adopt and adoption_record(dataset.root, have=have, want=want, generation=0):
        return {}
    if not differences:
        return {}
    history = dataset.history()
    report: dict[str, Any] = {}
    for family in _NOUN:
        fields = have.hard[family].keys() | want.hard[family].keys()
        report[family] = {
            "differences": {name: values for name, values in differences.items() if name in fields},
            f"{_NOUN[family]}s": int(history.held(family).live.sum()),
        }
    return report


def say_other_settings(dataset: Dataset, report: dict[str, Any]) -> None:
    """The report of `other_settings` for a person."""
    console.print(f"{dataset.root} was made with other settings:")
    for family, noun in _NOUN.items():
        differences, count = report[family]["differences"], count_of(report[family][f"{noun}s"], noun)
        if differences:
            console.print(f"{family}: {count} would be encoded anew")
            console.print(difference_lines(differences))
        else:
            console.print(f"{family}: {count}, not to be encoded again")
    console.print("two kinds of latents never mix in one dataset: set these back, or --set output=FOLDER")
    if all(may_be_adopted(name) for each in report.values() for name in each["differences"]):
        console.print("--adopt goes on with them for what is still to be encoded, and leaves a record of it")
