"""`latentpress retry`: quarantined rows asked for again, and how many; the next run is of just these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.console import console, count_table, print_json
from pipeline.retry import retry_failed
from schemas.card import read_card
from schemas.dataset import Dataset
from schemas.errors import EXIT_DONE, ConfigError
from schemas.index import read_quarantine
from schemas.verdict import Mending


def retry(dataset: Path, *, reasons: Sequence[str], everything: bool, as_json: bool) -> int:
    """Ask again for the rows quarantined for `reasons`, or for all of them; the exit code of the command."""
    card = read_card(dataset)
    if bool(reasons) == everything:
        there = dict.fromkeys(read_quarantine(dataset)["reason"].to_pylist())
        found = ", ".join(there) or "nothing is quarantined"
        raise ConfigError(f"give --reason CODE, as often as there are, or --all; reasons here: {found}")
    counts = retry_failed(Dataset(dataset), card, reasons=None if everything else reasons)
    if as_json:
        print_json({"rows": counts.total(), "reasons": dict(counts.most_common())})
        return EXIT_DONE
    if counts:
        console.print(count_table("reason", counts, unit="rows"))
        noun = "row waits" if counts.total() == 1 else "rows wait"
        run = "`latentpress preprocess` with its config"
        if card.imported_from:
            run = f"`{Mending(Dataset(dataset)).rerun}`"
        console.print(f"{counts.total()} {noun} to be tried again: run {run}")
    else:
        console.print("nothing is quarantined")
    return EXIT_DONE
