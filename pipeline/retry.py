"""Quarantined rows, asked for again: each gets a place in a new unit, which the next preprocess runs.

In: a dataset and reason codes. Out: one manifest generation more. Nothing that is committed changes: a row's
old unit keeps its failure record, which counts no longer, but in the `attempts` of a second failure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit import commit_once, open_store
from pipeline.reindex import update_tables
from schemas.card import Card
from schemas.dataset import Dataset
from schemas.errors import ConfigError
from schemas.history import History, codes_of, positions
from schemas.index import read_quarantine
from schemas.tables import sealed_parquet


def retry_failed(dataset: Dataset, card: Card, *, reasons: Collection[str] | None) -> Counter[str]:
    """Ask again for the rows quarantined for one of `reasons`, or for any; how many of each reason.

    ConfigError, which lists the reasons there are, for one that there is not.
    """
    with open_store(dataset.root):
        while True:
            history = dataset.history()
            update_tables(dataset, card, history)
            failed = read_quarantine(dataset.root)
            chosen = _chosen(dataset, failed, reasons)
            table = _asked_again(history, chosen["sample_id"])
            path = dataset.generation_path(history.generations)
            if not table.num_rows or commit_once(path, sealed_parquet(table)):
                update_tables(dataset, card, history.with_generation(table))
                return Counter(chosen["reason"].to_pylist())


def _chosen(dataset: Dataset, failed: pa.Table, reasons: Collection[str] | None) -> pa.Table:
    if reasons is None:
        return failed
    there = Counter(failed["reason"].to_pylist())
    if unknown := sorted(set(reasons) - set(there)):
        found = ", ".join(f"{reason} ({count})" for reason, count in there.most_common()) or "nothing"
        raise ConfigError(
            f"--reason {', '.join(unknown)}: nothing in {dataset.root} is quarantined for that; "
            f"quarantined there: {found}"
        )
    return failed.filter(pc.is_in(failed["reason"], value_set=pa.array(list(reasons), pa.string())))


def _asked_again(history: History, keys: pa.ChunkedArray) -> pa.Table:
    """All live rows of these sample_ids, each sample in a new unit; units as large as the largest so far."""
    live = history.live_table()
    table = live.take(np.flatnonzero(positions(live["sample_id"], among=keys) >= 0))
    if not table.num_rows:
        return table
    size = int(np.unique(history.held("latents").unit, return_counts=True)[1].max())
    unit = history.next_unit("latents") + codes_of(table["sample_id"]) // size
    return table.set_column(table.schema.get_field_index("unit"), "unit", pa.array(unit, pa.int64()))
