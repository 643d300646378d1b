"""Settings other than those of a dataset's card, taken on knowingly: `--adopt`, and the record it leaves.

In: the card of a dataset and the one a config asks for. Out: what differs, whether that is on record, or the
record to write. What is stored keeps its identity, and so do its fingerprints; what runs from then on is
made with the new settings. So only fields are adopted of which it can be claimed that the numbers stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas.card import UNKNOWN, Card, hard_differences
from schemas.errors import DatasetError, StaleDatasetError
from schemas.load import open_sealed_json, sealed_json
from schemas.patience import read_bytes
from schemas.sample import Family
from schemas.store import location

_ADOPTABLE = re.compile(
    r"decode_rules|decode\.(backend|device|threads)"
    r"|video_encoder\.(weights|table)_sha256|text_encoder\.(weights|tokenizer)_sha256"
)
"""Fields that can change while the numbers stay the same: who decodes, and the files of a model, which may be
saved anew; whether they are the same model is tried (`pipeline.adopting`). All others decide frames, shape,
type or meaning, of which one dataset cannot hold two kinds."""
Differences = dict[str, tuple[Any, Any]]


def adoption_path(dataset: str | Path, number: int) -> Path:
    return location(dataset) / f"adopted-{number:06d}.json"


def read_adoptions(dataset: str | Path) -> list[dict[str, Any]]:
    """Every record of an adoption, in order.

    `fields` maps field -> [card, adopted], `generation` is the number of the first manifest generation made
    with them, `soft` holds the versions of libraries.
    """
    records: list[dict[str, Any]] = []
    while (path := adoption_path(dataset, len(records))).exists():
        try:
            records.append(open_sealed_json(read_bytes(path)))
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path} is damaged: {error}; put back a copy of it") from error
    return records


def adoption_notes(dataset: str | Path) -> list[str]:
    """A sentence for every adoption on record."""
    notes = []
    for number, record in enumerate(read_adoptions(dataset)):
        fields = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in record["fields"].items())
        notes.append(
            f"{adoption_path(dataset, number).name}: what was encoded since manifest generation "
            f"{record['generation']} has other settings than the card: {fields}"
        )
    return notes


def is_adopted(dataset: str | Path, field: str, value: Any) -> bool:
    """Whether this value of a hard field was taken on."""
    return any(
        field in record["fields"] and record["fields"][field][1] == value
        for record in read_adoptions(dataset)
    )


def unsettled(dataset: str | Path, *, have: Card, want: Card) -> Differences:
    """Field -> (card, config) for every hard field that differs and was not adopted with that value."""
    return {
        field: values
        for field, values in hard_differences(have, want).items()
        if not is_adopted(dataset, field, values[1])
    }


def unlike_card(dataset: str | Path, card: Card, family: Family, fields: Mapping[str, Any]) -> Differences:
    """Field -> (card, here) for every hard field of a family that is here neither as in the card, where that
    tells it, nor as adopted. A field that the card lacks is None there."""
    return {
        field: (made_with, value)
        for field, value in fields.items()
        if (made_with := card.hard[family].get(field)) not in (value, UNKNOWN)
        and not is_adopted(dataset, field, value)
    }


def may_be_adopted(field: str) -> bool:
    return _ADOPTABLE.fullmatch(field) is not None


def refuse_stale(dataset: str | Path, *, have: Card, want: Card) -> None:
    """StaleDatasetError naming every hard field in which `want` differs from the dataset's card, but for
    those adopted before."""
    differences = unsettled(dataset, have=have, want=want)
    if differences:
        adoptable = all(map(may_be_adopted, differences))
        raise StaleDatasetError(
            f"{dataset} was made with other settings, and two kinds of latents never mix in one dataset:\n"
            + difference_lines(differences)
            + "\nset these back, or give another --set output=FOLDER"
            + (
                "; --adopt goes on with the new ones for what is not encoded yet, and leaves a record of it"
                if adoptable
                else ""
            ),
            differences,
        )


def difference_lines(differences: Differences) -> str:
    """One aligned line per field."""
    width = max(map(len, differences))
    return "\n".join(
        f"  {name:{width}}  dataset {old!r}, config {new!r}" for name, (old, new) in differences.items()
    )


def adoption_record(
    dataset: str | Path, *, have: Card, want: Card, generation: int
) -> tuple[Path, bytes] | None:
    """Where and what to create so that `want` is taken on from `generation`; None where nothing is unsettled.

    StaleDatasetError for a field that can never be adopted.
    """
    differences = unsettled(dataset, have=have, want=want)
    if not differences:
        return None
    if never := {name: values for name, values in differences.items() if not may_be_adopted(name)}:
        raise StaleDatasetError(
            f"{dataset}: these settings decide frames, shape, type or meaning of what is stored, and are "
            f"never adopted:\n{difference_lines(never)}\nset them back, or give another --set output=FOLDER",
            differences,
        )
    record = {"fields": {name: list(values) for name, values in differences.items()}, "soft": want.soft}
    path = adoption_path(dataset, len(read_adoptions(dataset)))
    return path, sealed_json({**record, "generation": generation})
