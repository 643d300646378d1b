"""How far a dataset is: what is left to do, its generations, the last run, and what it lacks.

In: a dataset. Out: JSON-able values. What is left is the difference of the tables from what was asked for, so
it is true after a run that was killed too; that takes a second or two for a million rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from schemas.dataset import Dataset
from schemas.errors import DatasetError
from schemas.history import TEXT
from schemas.index import lacks_empty_prompt, open_index, read_quarantine
from schemas.patience import read_bytes
from schemas.tables import read_sealed

_PAIR = ("sample_id", "caption_digest")


class _Pass(BaseModel):
    """What a page says of one family of the last run."""

    model_config = ConfigDict(extra="allow")

    clips: int
    clips_per_s: float
    video_s_per_s: float
    wall_s: float
    start_s: float
    bytes: int
    stage_busy: dict[str, float]
    incidents: dict[str, int]
    advice: str | None
    captions_cut: int = 0


class _LastRun(BaseModel):
    model_config = ConfigDict(extra="allow")

    stopped: str | None = None
    latents: _Pass | None = None
    prompts: _Pass | None = None


class _Summary(BaseModel):
    """What a page says of `summary.json`; fields of the tables beside it are not among them."""

    last_run: _LastRun | None = None
    notes: list[str] = []


def unfinished(dataset: Dataset) -> int:
    """Rows asked for that stand neither in the index nor in quarantine, so that a run has to go on.

    The history is read whole, which takes gigabytes for many millions of rows, only where there are some.
    """
    there = _pairs(open_index(dataset.root).read(columns=list(_PAIR)))
    failed = read_quarantine(dataset.root, columns=["sample_id"])["sample_id"]
    absent: list[np.ndarray] = []
    while (path := dataset.generation_path(len(absent))).exists():
        entries = read_sealed(path, columns=["op", *_PAIR], remedy="put back a copy of it")
        known = pc.or_(
            pc.is_in(_pairs(entries), value_set=there), pc.is_in(entries["sample_id"], value_set=failed)
        )
        absent.append(pc.and_not(pc.equal(entries["op"], "add"), known).to_numpy())
    if not any(each.any() for each in absent):
        return 0
    lacking, live = np.concatenate(absent), dataset.history().live
    live = live[live < len(lacking)]  # a run may have added a generation meanwhile
    return int(lacking[live].sum())  # others were removed or replaced


def _pairs(table: pa.Table) -> pa.ChunkedArray:
    """One string a row, equal for the same clip with the same caption."""
    return pc.binary_join_element_wise(*(pc.cast(table[name], TEXT) for name in _PAIR), pa.scalar(" ", TEXT))


def generations(dataset: Dataset) -> list[dict[str, int]]:
    """Rows that every manifest generation removed, and others that it holds: new, changed, touched, or tried
    again; oldest first."""
    found: list[dict[str, int]] = []
    while (path := dataset.generation_path(len(found))).exists():
        ops = read_sealed(path, columns=["op"], remedy="put back a copy of it")
        kept = int(pc.sum(pc.equal(ops["op"], "add")).as_py() or 0)
        found.append({"generation": len(found), "added_or_changed": kept, "removed": ops.num_rows - kept})
    return found


def read_summary(dataset: Dataset) -> dict[str, Any]:
    """`last_run` and `notes` of `summary.json`; neither where it cannot be read: it can be made again."""
    try:
        found = _Summary.model_validate_json(read_bytes(dataset.summary_path))
    except (FileNotFoundError, ValueError):
        found = _Summary()
    return found.model_dump()


def gaps(dataset: Dataset) -> list[str]:
    """What a dataset lacks or has beside it, and its tables do not tell."""
    found = []
    try:
        if lacks_empty_prompt(dataset.root):
            found.append(
                "there is no empty prompt, so training cannot drop captions; an import into a new folder, "
                "with --text-encoder, makes it"
            )
    except DatasetError:
        pass  # a damaged record is told of with the others
    if (dataset.root / "metrics.jsonl").exists():
        found.append(
            "a training run lies in the same folder, and this page is of the dataset alone; give each its own"
        )
    return found
