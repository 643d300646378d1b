"""`latentpress gc`: what killed runs left in a dataset, listed and removed."""

from __future__ import annotations

from pathlib import Path

from jobs.console import print_json
from pipeline.collect import find_orphans, remove
from schemas.dataset import Dataset
from schemas.errors import EXIT_DONE


def gc(dataset: Path, *, older_than_h: float, dry_run: bool, as_json: bool) -> int:
    """Remove what nothing needs and nobody changed for `older_than_h` hours; only list it where `dry_run`."""
    place = Dataset(dataset)
    orphans = find_orphans(place, older_than_s=older_than_h * 3600)
    removed = [orphan for orphan in orphans if dry_run or remove(place, orphan)]
    nbytes = sum(orphan.nbytes for orphan in removed)
    if as_json:
        listed = [
            {"name": each.name, "kind": each.kind, "bytes": each.nbytes, "age_h": round(each.age_s / 3600, 2)}
            for each in removed
        ]
        print_json({"dry_run": dry_run, "bytes": nbytes, "orphans": listed})
        return EXIT_DONE
    for orphan in removed:
        print(f"{orphan.nbytes:>14,} B  {orphan.age_s / 3600:8.1f} h  {orphan.kind}  {orphan.name}")
    did = "would be removed" if dry_run else "removed"
    print(f"{dataset}: {len(removed)} orphans older than {older_than_h:g} h {did}, {nbytes / 1e6:.1f} MB")
    return EXIT_DONE
