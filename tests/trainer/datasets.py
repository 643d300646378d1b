"""A small latent dataset for tests, through the pipeline's own generations, shard writer and index builder.

Clips differ in length, shape and prompt length; their tensors are random numbers seeded by clip number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.generation import add_generation, pending_units
from pipeline.reindex import update_tables
from pipeline.shard_writer import ShardWriter
from pipeline.source import Source
from schemas.bucket import Geometry
from schemas.card import card_bytes, card_path, make_card
from schemas.codec import TAGS, Tensor, from_float32
from schemas.config import BucketConfig, Dtype, PreprocessConfig, TextEncoderConfig, VideoEncoderConfig
from schemas.dataset import Dataset
from schemas.manifest import ManifestRow
from schemas.scaling import ImageLatents, Scaling

GEOMETRY = Geometry(temporal=4, spatial=8, channels=16)
FPS = 8.0
PROMPT_WIDTH = 24
PROMPT_ROWS = 8
"""Of the longest."""

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = (
    (5, 32, 48),
    (9, 32, 32),
    (13, 48, 32),
    (1, 32, 32),
    (17, 32, 48),
    (9, 48, 48),
    (21, 32, 32),
)
"""Frames, height, width in pixels: 4 to 30 video tokens, and 4 to 8 prompt tokens each."""


def clip_tensors(number: int, shape: Shape, *, store: str, dtype: Dtype) -> dict[str, Tensor]:
    """What is stored for clip `number`."""
    latent_shape = GEOMETRY.latent_shape(BucketConfig(num_frames=shape[0], height=shape[1], width=shape[2]))
    generator = np.random.default_rng(number)
    names = ("mean", "logvar") if store == "moments" else ("latents",)
    return {name: from_float32(generator.standard_normal(latent_shape), dtype=TAGS[dtype]) for name in names}


def prompt_tensors(number: int) -> dict[str, Tensor]:
    """What is stored for the caption of clip `number`; -1 is the empty prompt."""
    length = 4 + number % 5
    values = np.random.default_rng(1000 + number).standard_normal((length, PROMPT_WIDTH))
    return {
        "prompt_embeds": from_float32(values, dtype="F32"),
        "prompt_mask": Tensor("U8", np.ones(length, np.uint8)),
    }


def write_dataset(
    root: Path,
    *,
    shapes: Sequence[Shape] = SHAPES,
    store: Literal["moments", "mean", "sample"] = "moments",
    dtype: Dtype = "float32",
    scaling: Scaling | None = None,
    rows_per_unit: int = 3,
    padding: Literal["full", "trim"] = "full",
    image: ImageLatents = "none",
) -> Path:
    """One sample per entry of `shapes`, in shards of `rows_per_unit`; its `source` is its number."""
    root.mkdir(parents=True)
    dataset = Dataset(root)
    config = PreprocessConfig(
        manifest="rows.jsonl",
        output=str(root),
        buckets=tuple(BucketConfig(num_frames=f, height=h, width=w) for f, h, w in sorted(set(shapes))),
        video_encoder=VideoEncoderConfig(store=store, dtype=dtype),
        text_encoder=TextEncoderConfig(max_length=PROMPT_ROWS, padding=padding),
    )
    card = make_card(
        config,
        video_fields={},
        text_fields={},
        scaling=scaling or Scaling(rule="factor", factor=0.7),
        geometry=GEOMETRY,
        versions={},
        image=image,
    )
    card_path(root).write_bytes(card_bytes(card))
    rows = [ManifestRow(i, source=str(i), path=f"/{i}", caption=f"clip {i}") for i in range(len(shapes))]
    sources = {row.path: Source(digest=row.source, size=1, mtime_ns=0) for row in rows}
    add_generation(dataset, card, rows=rows, sources=sources, unit_rows=rows_per_unit)
    for family in ("prompts", "latents"):
        for unit in pending_units(dataset, family):
            fingerprint = card.family_fingerprint(family)
            with ShardWriter(dataset, family=family, unit=unit.number, fingerprint=fingerprint) as shard:
                for row in unit.rows:
                    if family == "prompts":
                        number = int(row["caption"].removeprefix("clip ") or -1)
                        shard.add(row["key"], prompt_tensors(number), meta={})
                    else:
                        number = int(row["source"])
                        tensors = clip_tensors(number, shapes[number], store=store, dtype=dtype)
                        shard.add(row["key"], tensors, meta=_clip_meta(shapes[number]))
                shard.commit(quarantined=[], seconds={})
    update_tables(dataset, card)
    return root


def _clip_meta(shape: Shape) -> dict[str, object]:
    num_frames, height, width = shape
    clip = {
        "source_fps": FPS,
        "effective_fps": FPS,
        "pts_s": [i / FPS for i in range(num_frames)],
        "coverage": 1.0,
        "frame_weights": [1.0] * num_frames,
        "interpolated": [],
        "duplicated": [],
        "repaired": [],
    }
    return {"num_frames": num_frames, "height": height, "width": width, "clip": clip}
