"""What a plan says of a dataset that is there already: what changed and what runs for it, or why it is stale.

In: the card and the rows that a config asks for. Out: counts, causes, and a sentence for each. Files that the
dataset has never seen are taken as new without reading them; a plan reads only those it knows, where their
size or time is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jobs.console import console
from pipeline.changes import Changes, find_changes
from pipeline.fetch import Fetcher
from pipeline.generation import known_sources
from pipeline.outlook import outlook
from pipeline.source import Source, identify
from schemas.adoption import adoption_record, difference_lines, may_be_adopted, unsettled
from schemas.card import Card
from schemas.config import PreprocessConfig
from schemas.dataset import Dataset
from schemas.errors import DatasetError
from schemas.history import History
from schemas.index import read_quarantine
from schemas.manifest import ManifestRow
from schemas.sample import Family

_NOUN: dict[Family, str] = {"latents": "clips", "prompts": "captions"}


class Growth:
    """The clips of a manifest, held against its dataset; `card` is that of the dataset."""

    def __init__(
        self,
        dataset: Dataset,
        card: Card,
        config: PreprocessConfig,
        clips: Sequence[ManifestRow],
        *,
        rows: int,
    ) -> None:
        """`rows`: how many of the manifest make the `clips`."""
        before = dataset.history()
        sources = _sources(clips, config, before)
        self._dataset, self._clips = dataset, clips
        self._changes: Changes = find_changes(
            dataset, card, rows=clips, sources=sources, unit_rows=config.units.rows, history=before
        )
        after = before.with_generation(self._changes.table)
        self.outlook = outlook(dataset, self._changes, rows=rows, before=before, after=after)
        finished = dataset.finished()
        self._latents_done = np.isin(self._changes.unit, finished["latents"])
        self._prompts_done = np.isin(self._changes.prompt_unit, finished["prompts"])

    def done(self, chosen: np.ndarray) -> tuple[int, int]:
        """How many of the `chosen` clips are committed, and how many of these are quarantined."""
        done = self._latents_done & self._prompts_done & chosen
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
        """Every clip, but for new ones, that is not what the dataset holds: its row, why, and what runs."""
        found = []
        for i, cause in enumerate(self._changes.cause):
            if cause not in ("", "new"):
                runs = ["latents"] * (not self._latents_done[i]) + ["prompts"] * (not self._prompts_done[i])
                what = "prompts only" if runs == ["prompts"] else " and ".join(runs) or "nothing runs"
                clip = self._clips[i]
                found.append({"row": clip.number, "source": clip.source, "cause": cause, "runs": what})
        return found


def _sources(clips: Sequence[ManifestRow], config: PreprocessConfig, history: History) -> dict[str, Source]:
    known = known_sources(history)
    seen = {path for path, _, _ in known}
    paths = dict.fromkeys(clip.path for clip in clips)
    sources = {path: Source(f"unread:{path}", 0, 0) for path in paths if path not in seen}
    fetcher = Fetcher(config.sources, config.limits)
    here = [path for path in paths if path in seen]
    return sources | identify(here, mode=config.identity, known=known, fetcher=fetcher)


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
            _NOUN[family]: int(history.held(family).live.sum()),
        }
    return report


def say_other_settings(dataset: Dataset, report: dict[str, Any]) -> None:
    """The report of `other_settings` for a person."""
    console.print(f"{dataset.root} was made with other settings:")
    for family, noun in _NOUN.items():
        differences, count = report[family]["differences"], report[family][noun]
        if differences:
            console.print(f"{family}: all {count} {noun} would be encoded anew")
            console.print(difference_lines(differences))
        else:
            console.print(f"{family}: the {count} {noun} stay as they are")
    console.print("two kinds of latents never mix in one dataset: set these back, or --set output=FOLDER")
    if all(may_be_adopted(name) for each in report.values() for name in each["differences"]):
        console.print("--adopt goes on with them for what is still to be encoded, and leaves a record of it")
