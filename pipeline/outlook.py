"""What a changed manifest means for its dataset, in the words that `plan` and `preprocess` share."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

from pipeline.changes import Changes
from schemas.dataset import Dataset
from schemas.history import History
from schemas.sample import Family


@dataclass(frozen=True)
class Outlook:
    """What a manifest changes, and what runs for it; `str` is the sentence that plan and preprocess say."""

    rows: int
    """Of the manifest."""
    clips: int
    """That they make; what follows counts these."""
    new: int
    captions_changed: int
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

    def __str__(self) -> str:
        parts = (
            (self.new, "new", "new"),
            (self.captions_changed, "caption changed: prompts only", "captions changed: prompts only"),
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
    finished, causes = dataset.finished(), Counter(changes.cause)
    unfinished = retried = 0
    to_encode: dict[Family, int] = {}
    for family in ("latents", "prompts"):
        held = after.held(family)
        here = held.live & ~np.isin(held.unit, finished[family])
        again = here & held.old
        to_encode[family] = int(here.sum())
        waiting = np.setdiff1d(held.unit[here], held.unit[again])
        unfinished += int((waiting < before.next_unit(family)).sum())
        if family == "latents":
            retried = int(np.isin(changes.unit, held.unit[again]).sum())
    return Outlook(
        rows=rows,
        clips=len(changes.cause),
        new=causes["new"],
        captions_changed=causes["caption changed"],
        files_replaced=causes["file replaced"],
        moved=causes["moved"],
        removed=changes.removed,
        to_retry=retried,
        units_unfinished=unfinished,
        clips_to_encode=to_encode["latents"],
        captions_to_encode=to_encode["prompts"],
    )
