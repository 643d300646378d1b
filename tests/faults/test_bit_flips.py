"""One byte of a dataset changes: verification knows, and the trainer gets what was stored or an error.

500 bytes drawn at random, as many from each kind of file, each changed to a random other value, one at a
time. There is no third outcome and no harmless byte: shards, tables and records are hashed whole, padding,
spelling and all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from schemas.check import check_dataset
from schemas.dataset import Dataset
from schemas.errors import DatasetError
from tests.pipeline.fake import ask, finish, make_dataset, make_rows
from trainer.catalog import Catalog
from trainer.reader import SampleReader
from trainer.visit import Visit

FLIPS = 500
KINDS = {
    "card": "card.json",
    "generation": "manifest/*.parquet",
    "commit": "commits/*/*.json",
    "latents": "latents/*/*.tar",
    "prompts": "prompts/*/*.tar",
    "index": "index.parquet",
    "quarantine": "quarantine.parquet",
}
Delivered = list[tuple[str, bytes, bytes]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Nine rows in two generations, one of them quarantined."""
    folder = tmp_path_factory.mktemp("flips")
    dataset, card = make_dataset(folder / "latents")
    for count in (6, 9):
        ask(dataset, card, make_rows(folder / "videos", count), unit_rows=4)
        finish(dataset, card)
    return dataset


def flips(dataset: Dataset) -> Iterator[tuple[str, Path, int, int]]:
    """(kind, file, position, what to exclusive-or the byte there with)."""
    rng = np.random.default_rng(0)
    files = {kind: sorted(dataset.root.glob(pattern)) for kind, pattern in KINDS.items()}
    for number in range(FLIPS):
        kind = list(KINDS)[number % len(KINDS)]
        path = files[kind][rng.integers(len(files[kind]))]
        yield kind, path, int(rng.integers(path.stat().st_size)), int(rng.integers(1, 256))


def flip(path: Path, position: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ mask]))


def is_found(dataset: Dataset) -> bool:
    try:
        return not check_dataset(dataset.root).clean
    except DatasetError:
        return True


def delivered(dataset: Dataset) -> Delivered:
    """What the trainer gets of every sample."""
    catalog = Catalog(dataset.root)
    reader = SampleReader(catalog)
    try:
        segments = [
            reader.segment(Visit(row, first=0, latent_frames=int(catalog.shapes[row, 0]), key=str(row)))
            for row in range(len(catalog))
        ]
    finally:
        reader.close()
    return [(s.sample_id, s.latents.numpy().tobytes(), s.prompt_embeds.numpy().tobytes()) for s in segments]


def test_every_changed_byte_is_found_and_none_reaches_the_trainer(dataset: Dataset) -> None:
    sound = delivered(dataset)
    assert len(sound) == 8
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for kind, path, position, mask in flips(dataset):
        where = f"{path.name}, byte {position} ^ {mask}"
        flip(path, position, mask)
        try:
            assert is_found(dataset), f"verification passes {where}"
            try:
                assert delivered(dataset) == sound, f"the trainer got something else after {where}"
                outcomes[kind]["as stored"] += 1
            except DatasetError:
                outcomes[kind]["refused"] += 1
        finally:
            flip(path, position, mask)
    assert not is_found(dataset)
    assert sum(sum(counts.values()) for counts in outcomes.values()) == FLIPS
    # Not vacuous: what the trainer reads was changed under it, and it said so.
    assert outcomes["latents"]["refused"] > FLIPS / len(KINDS) / 2
    assert outcomes["index"]["as stored"] == outcomes["commit"]["refused"] == 0
