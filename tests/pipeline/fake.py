"""A small dataset without video or encoders: real card, generations, shards, commits and tables."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pipeline.commit import commit_once, make_folder
from pipeline.generation import Unit, add_generation, pending_units
from pipeline.outlook import Outlook, outlook
from pipeline.reindex import update_tables
from pipeline.shard_writer import ShardWriter
from pipeline.source import Source, identify, same_content
from schemas.bucket import Geometry
from schemas.card import Card, card_bytes, card_path, make_card
from schemas.codec import Tensor, from_float32
from schemas.config import BucketConfig, PreprocessConfig
from schemas.dataset import Dataset
from schemas.manifest import ManifestRow
from schemas.sample import FailureRecord, UnitCommit
from schemas.scaling import Scaling

BUCKET = BucketConfig(num_frames=9, height=32, width=48)
BROKEN = b"video 7"
"""Content of a file that cannot be decoded; `make_rows` makes one such."""
_BROKEN_DIGEST = f"content:{hashlib.sha256(BROKEN).hexdigest()}"


def make_dataset(root: Path) -> tuple[Dataset, Card]:
    config = PreprocessConfig(manifest="m", output=str(root), buckets=(BUCKET,))
    card = make_card(
        config,
        video_fields={"name": "fake"},
        text_fields={"name": "fake"},
        scaling=Scaling(rule="factor", factor=0.5),
        geometry=Geometry(temporal=4, spatial=8, channels=16),
        versions={"numpy": np.__version__},
    )
    make_folder(root)
    commit_once(card_path(root), card_bytes(card))
    return Dataset(root), card


def ask(dataset: Dataset, card: Card, rows: list[ManifestRow], *, unit_rows: int = 2) -> Outlook:
    """Plan as `preprocess` does; what it means."""
    sources = identify([row.path for row in rows], mode="content", known={})
    before = dataset.history()
    after, changes = add_generation(
        dataset, card, rows=rows, sources=sources, unit_rows=unit_rows, history=before
    )
    return outlook(dataset, changes, rows=len(rows), before=before, after=after)


def make_rows(folder: Path, count: int, *, start: int = 0) -> list[ManifestRow]:
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(start, start + count):
        path = folder / f"{i}.mp4"
        path.write_bytes(f"video {i}".encode())
        rows.append(ManifestRow(i + 1, path.name, str(path), f"caption {i % 3}"))
    return rows


def write_unit(dataset: Dataset, card: Card, unit: Unit) -> UnitCommit:
    """Latents drawn from the key, so that equal units have equal bytes; content that is `BROKEN` fails."""
    fingerprint = card.family_fingerprint(unit.family)
    failures = []
    with ShardWriter(dataset, family=unit.family, unit=unit.number, fingerprint=fingerprint) as shard:
        for row in unit.rows:
            rng = np.random.default_rng(int(row["key"], 16))
            if unit.family == "prompts":
                embeds = from_float32(rng.standard_normal((5, 8)), dtype="F32")
                mask = Tensor("U8", np.ones(5, np.uint8))
                shard.add(row["key"], {"prompt_embeds": embeds, "prompt_mask": mask}, meta={"num_tokens": 5})
                continue
            if "path" in row:
                found = Source(row["source_digest"], row["size"], row["mtime_ns"])
                assert same_content(row["path"], found), "planned for a file that is not there"
            if row.get("source_digest") == _BROKEN_DIGEST:
                failures.append(
                    FailureRecord(key=row["key"], stage="decode", reason="bad", message="no", attempts=1)
                )
                continue
            latents = {
                name: from_float32(rng.standard_normal((3, 16, 4, 6)), dtype="F32")
                for name in card.latent_tensors
            }
            clip = {
                "source_fps": 25.0,
                "pts_s": [i / 25 for i in range(9)],
                "coverage": 1.0,
                "effective_fps": 8.0,
                "duplicated": [],
                "repaired": [],
                "interpolated": [],
                "frame_weights": [1.0] * 9,
            }
            shard.add(row["key"], latents, meta={"num_frames": 9, "height": 32, "width": 48, "clip": clip})
        return shard.commit(quarantined=failures, seconds={"encode": 0.1})


def finish(dataset: Dataset, card: Card) -> list[UnitCommit]:
    """Run every pending unit and build the tables, as `preprocess` does."""
    commits = [
        write_unit(dataset, card, unit)
        for unit in [*pending_units(dataset, "prompts"), *pending_units(dataset, "latents")]
    ]
    update_tables(dataset, card)
    return commits
