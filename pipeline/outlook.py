"""What a changed manifest means for its dataset, in the words that `plan` and `preprocess` share."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

from pipeline.changes import Changes
from schemas.dataset import Dataset
from schemas.history import KEY, History, positions
from schemas.sample import EMPTY_PROMPT_UNIT, Family

_RUNS_FOR: dict[Family, tuple[str, ...]] = {
    "latents": ("new", "file replaced"),
    "prompts": ("new", "file replaced", "caption changed"),
}
"""Causes that say already that a family of a row runs."""


@dataclass(frozen=True)
class Outlook:
    """What a manifest changes, and what runs for it; `str` is the sentence that plan and preprocess say."""

    rows: int
    """Of the manifest."""
    clips: int
    """That they make; what follows counts these."""
    new: int
    captions_changed: int
    captions_stored: int
    """Of those changed: to one that is stored already, so that nothing runs for it."""
    files_replaced: int
    moved: int
    """Under another path, with the same content and caption: nothing runs."""
    removed: int
    to_retry: int
    """Rows put into another unit: by `latentpress retry`, or because their unit was made without them."""
    units_unfinished: int
    """Planned before and not committed yet, those of rows to retry not counted."""
    clips_to_encode: int
    captions_to_encode: int
    """With the empty one, which every dataset holds."""

    def __str__(self) -> str:
        parts = (
            (self.new, "new", "new"),
            (
                self.captions_changed - self.captions_stored,
                *(f"{noun} changed: prompts only" for noun in ("caption", "captions")),
            ),
            (
                self.captions_stored,
                "caption changed to one that is stored: nothing runs",
                "captions changed to some that are stored: nothing runs",
            ),
            (self.files_replaced, "file replaced: latents", "files replaced: latents"),
            (self.moved, "moved: nothing runs", "moved: nothing runs"),
            (self.removed, *["removed: hidden, nothing rewritten"] * 2),
            (self.to_retry, "to retry", "to retry"),
            (self.units_unfinished, "unit unfinished", "units unfinished"),
        )
        said = [f"{count} {one if count == 1 else many}" for count, one, many in parts if count]
        rows = f"{self.rows} {'row' if self.rows == 1 else 'rows'}"
        into = f" make {self.clips} clips" if self.clips != self.rows else ""
        return f"{rows}{into}: {', '.join(said) or 'nothing changed'}"

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def outlook(dataset: Dataset, changes: Changes, *, rows: int, before: History, after: History) -> Outlook:
    """What `changes`, which lead from one history to the other, mean."""
    finished, cause = dataset.finished(), np.array(changes.cause, object)
    causes, stored = Counter(changes.cause), np.isin(changes.prompt_unit, finished["prompts"])
    unfinished, retried = 0, np.zeros(len(changes.cause), bool)
    to_encode: dict[Family, int] = {}
    for family in ("latents", "prompts"):
        held = after.held(family)
        here = held.live & ~np.isin(held.unit, finished[family])
        if family == "prompts":
            here &= held.unit != EMPTY_PROMPT_UNIT
        again = here & held.old
        to_encode[family] = int(here.sum())
        waiting = np.setdiff1d(held.unit[here], held.unit[again])
        unfinished += int((waiting < before.next_unit(family)).sum())
        keys = after.table[KEY[family]].take(held.row[again])
        retried |= (positions(changes.keys[family], among=keys) >= 0) & ~np.isin(cause, _RUNS_FOR[family])
    if EMPTY_PROMPT_UNIT not in finished["prompts"]:
        to_encode["prompts"] += 1
        unfinished += before.generations > 0
    return Outlook(
        rows=rows,
        clips=len(changes.cause),
        new=causes["new"],
        captions_changed=causes["caption changed"],
        captions_stored=int((stored & (cause == "caption changed")).sum()),
        files_replaced=causes["file replaced"],
        moved=causes["moved"],
        removed=changes.removed,
        to_retry=int(retried.sum()),
        units_unfinished=unfinished,
        clips_to_encode=to_encode["latents"],
        captions_to_encode=to_encode["prompts"],
    )
