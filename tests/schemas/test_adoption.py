"""Settings that differ: refused field by field, taken on only where they may be, and never in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schemas.adoption import adoption_record, read_adoptions, refuse_stale
from schemas.card import Card
from schemas.errors import DatasetError, StaleDatasetError
from tests.pipeline.fake import make_dataset


def changed(card: Card, **fields: Any) -> Card:
    hard = {family: dict(values) for family, values in card.hard.items()}
    for name, value in fields.items():
        hard["latents"][name.replace("__", ".")] = value
    return card.model_copy(update={"hard": hard})


def adopt(root: Path, have: Card, want: Card, generation: int) -> None:
    record = adoption_record(root, have=have, want=want, generation=generation)
    assert record is not None
    record[0].write_bytes(record[1])


def test_an_adopted_value_is_accepted_and_no_other(tmp_path: Path) -> None:
    _, card = make_dataset(tmp_path)
    pad, stretch = changed(card, resize__mode="pad"), changed(card, resize__mode="stretch")
    with pytest.raises(
        StaleDatasetError, match=r"(?s)resize\.mode +dataset 'cover_crop', config 'pad'.*--adopt"
    ) as e:
        refuse_stale(tmp_path, have=card, want=pad)
    assert e.value.differences == {"resize.mode": ("cover_crop", "pad")}
    adopt(tmp_path, card, pad, 3)
    refuse_stale(tmp_path, have=card, want=pad)
    refuse_stale(tmp_path, have=card, want=card)
    assert adoption_record(tmp_path, have=card, want=pad, generation=4) is None
    with pytest.raises(StaleDatasetError, match="'stretch'"):
        refuse_stale(tmp_path, have=card, want=stretch)
    adopt(tmp_path, card, stretch, 5)
    fields = [(record["generation"], record["fields"]) for record in read_adoptions(tmp_path)]
    assert fields == [
        (3, {"resize.mode": ["cover_crop", "pad"]}),
        (5, {"resize.mode": ["cover_crop", "stretch"]}),
    ]


@pytest.mark.parametrize(
    "field", ["video_encoder__store", "video_encoder__dtype", "scaling", "buckets", "identity"]
)
def test_what_decides_shape_type_or_meaning_is_never_adopted(tmp_path: Path, field: str) -> None:
    _, card = make_dataset(tmp_path)
    want = changed(card, **{field: "other"}, resize__mode="pad")
    with pytest.raises(StaleDatasetError) as refused:
        refuse_stale(tmp_path, have=card, want=want)
    assert "--adopt" not in str(refused.value)
    with pytest.raises(StaleDatasetError, match="never adopted"):
        adoption_record(tmp_path, have=card, want=want, generation=0)
    assert read_adoptions(tmp_path) == []


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    _, card = make_dataset(tmp_path)
    adopt(tmp_path, card, changed(card, resize__mode="pad"), 0)
    path = tmp_path / "adopted-000000.json"
    path.write_bytes(path.read_bytes().replace(b"pad", b"bad"))
    with pytest.raises(DatasetError, match=r"adopted-000000\.json is damaged"):
        read_adoptions(tmp_path)
