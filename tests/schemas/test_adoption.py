"""Settings that differ: refused field by field, taken on only where they may be, and never in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schemas.adoption import adoption_record, may_be_adopted, read_adoptions, refuse_stale
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
    other, third = changed(card, decode__backend="other"), changed(card, decode__backend="third")
    with pytest.raises(
        StaleDatasetError, match=r"(?s)decode\.backend +dataset 'pyav', config 'other'.*--adopt"
    ) as e:
        refuse_stale(tmp_path, have=card, want=other)
    assert e.value.differences == {"decode.backend": ("pyav", "other")}
    adopt(tmp_path, card, other, 3)
    refuse_stale(tmp_path, have=card, want=other)
    refuse_stale(tmp_path, have=card, want=card)
    assert adoption_record(tmp_path, have=card, want=other, generation=4) is None
    with pytest.raises(StaleDatasetError, match="'third'"):
        refuse_stale(tmp_path, have=card, want=third)
    adopt(tmp_path, card, third, 5)
    fields = [(record["generation"], record["fields"]) for record in read_adoptions(tmp_path)]
    assert fields == [
        (3, {"decode.backend": ["pyav", "other"]}),
        (5, {"decode.backend": ["pyav", "third"]}),
    ]


@pytest.mark.parametrize(
    "field",
    [
        *("video_encoder__store", "video_encoder__dtype", "video_encoder__kind", "scaling", "buckets"),
        *("identity", "seed", "frames__policy", "frames__short", "resize__mode", "picture__deinterlace"),
        "a_field_of_tomorrow",
    ],
)
def test_what_decides_shape_type_or_meaning_is_never_adopted(tmp_path: Path, field: str) -> None:
    _, card = make_dataset(tmp_path)
    want = changed(card, **{field: "other"}, decode__backend="other")
    with pytest.raises(StaleDatasetError) as refused:
        refuse_stale(tmp_path, have=card, want=want)
    assert "--adopt" not in str(refused.value)
    with pytest.raises(StaleDatasetError, match="never adopted"):
        adoption_record(tmp_path, have=card, want=want, generation=0)
    assert read_adoptions(tmp_path) == []


@pytest.mark.parametrize(
    "field",
    [
        *("decode_rules", "decode.backend", "decode.device", "decode.threads", "video_encoder.table_sha256"),
        *("video_encoder.weights_sha256", "text_encoder.weights_sha256", "text_encoder.tokenizer_sha256"),
    ],
)
def test_what_can_be_claimed_to_give_the_same_numbers_may_be_adopted(field: str) -> None:
    assert may_be_adopted(field)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    _, card = make_dataset(tmp_path)
    adopt(tmp_path, card, changed(card, decode__backend="other"), 0)
    path = tmp_path / "adopted-000000.json"
    path.write_bytes(path.read_bytes().replace(b"other", b"otter"))
    with pytest.raises(DatasetError, match=r"adopted-000000\.json is damaged"):
        read_adoptions(tmp_path)
