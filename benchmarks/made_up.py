"""A latent dataset of made-up numbers in the sizes of real ones, to measure what reads it.

In: a folder and a number of clips. Out: a dataset as `preprocess` leaves it, through the pipeline's own shard
writer. Moments are normal numbers, of which every clip has a window of its own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.generation import add_generation, pending_units
from pipeline.reindex import update_tables
from pipeline.shard_writer import ShardWriter
from pipeline.source import Source
from schemas.bucket import Geometry
from schemas.card import card_bytes, card_path, make_card
from schemas.codec import Tensor, from_float32
from schemas.config import BucketConfig, PreprocessConfig, VideoEncoderConfig
from schemas.dataset import Dataset
from schemas.manifest import ManifestRow
from schemas.sample import Family
from schemas.scaling import Scaling

CHANNELS, HEIGHT, WIDTH = 16, 60, 90
"""A clip of 480 x 720 pixels under CogVideoX's VAE."""
PROMPT = (226, 4096)
LENGTHS = (13,) * 8 + (37,) * 2 + (73,)
"""Latent frames, over and over: windows of 3, 9 and 18 s."""


def write_dataset(root: Path, *, clips: int, store: Literal["moments", "mean"] = "moments") -> Path:
    """A dataset of `clips` samples in bfloat16, with prompts."""
    root.mkdir(parents=True)
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(clips)]
    config = PreprocessConfig(
        manifest="rows.jsonl",
        output=str(root),
        buckets=tuple(
            BucketConfig(num_frames=_frames(length), height=HEIGHT * 8, width=WIDTH * 8)
            for length in sorted(set(lengths))
        ),
        video_encoder=VideoEncoderConfig(store=store),
    )
    card = make_card(
        config,
        video_fields={},
        text_fields={},
        scaling=Scaling(rule="factor", factor=0.7),
        geometry=Geometry(temporal=4, spatial=8, channels=CHANNELS),
        versions={},
    )
    card_path(root).write_bytes(card_bytes(card))
    rows = [ManifestRow(i, source=str(i), path=f"/{i}", caption=f"clip {i}") for i in range(clips)]
    sources = {row.path: Source(digest=row.source, size=1, mtime_ns=0) for row in rows}
    dataset = Dataset(root)
    add_generation(dataset, card, rows=rows, sources=sources, unit_rows=8)
    size = 2 * max(lengths) * CHANNELS * HEIGHT * WIDTH
    numbers = from_float32(np.random.default_rng(0).standard_normal(size, np.float32), dtype="BF16").data
    names = ("mean", "logvar") if store == "moments" else ("latents",)
    families: tuple[Family, ...] = ("prompts", "latents")
    for family in families:
        for unit in pending_units(dataset, family):
            fingerprint = card.family_fingerprint(family)
            with ShardWriter(dataset, family=family, unit=unit.number, fingerprint=fingerprint) as shard:
                for row in unit.rows:
                    if family == "prompts":
                        shard.add(row["key"], _prompt(numbers, row["caption"]), meta={})
                    else:
                        number = int(row["source"])
                        shape = (lengths[number], CHANNELS, HEIGHT, WIDTH)
                        tensors = {
                            name: Tensor("BF16", _window(numbers, 64 * number + 32 * i, shape))
                            for i, name in enumerate(names)
                        }
                        shard.add(row["key"], tensors, meta=_meta(lengths[number]))
                shard.commit(quarantined=[], seconds={})
    update_tables(dataset, card)
    return root


def _frames(latent_frames: int) -> int:
    return 4 * latent_frames - 3


def _window(numbers: np.ndarray, first: int, shape: tuple[int, ...]) -> np.ndarray:
    return numbers[first : first + math.prod(shape)].reshape(shape)


def _prompt(numbers: np.ndarray, caption: str) -> dict[str, Tensor]:
    """The empty one has the numbers of clip 0's."""
    embeds = _window(numbers, 64 * int(caption.removeprefix("clip ") or 0) + 16, PROMPT)
    mask = Tensor("U8", np.ones(PROMPT[0], np.uint8))
    return {"prompt_embeds": Tensor("BF16", embeds), "prompt_mask": mask}


def _meta(latent_frames: int) -> dict[str, object]:
    num_frames = _frames(latent_frames)
    clip = {
        "source_fps": 16.0,
        "effective_fps": 16.0,
        "pts_s": [i / 16 for i in range(num_frames)],
        "coverage": 1.0,
        "frame_weights": [1.0] * num_frames,
        "interpolated": [],
        "duplicated": [],
        "repaired": [],
    }
    return {"num_frames": num_frames, "height": HEIGHT * 8, "width": WIDTH * 8, "clip": clip}
