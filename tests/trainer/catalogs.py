"""Catalogs of clips that exist as index rows alone: for all that is planned before anything is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.bucket import PATCH, Geometry, bucket_name
from schemas.card import card_bytes, card_path, make_card
from schemas.config import BucketConfig, FramesConfig, PreprocessConfig, TextEncoderConfig
from schemas.index import index_schema
from schemas.sample import caption_digest, sample_id
from schemas.scaling import Scaling
from schemas.tables import sealed_parquet
from schemas.train_config import TrainConfig
from trainer.catalog import Catalog
from trainer.frame_weights import FrameWeights
from trainer.mixture import Mixture
from trainer.stage_plan import StagePlan

GEOMETRY = Geometry(temporal=4, spatial=8, channels=16)
FPS = 8.0
EMPTY_PROMPT = 3


@dataclass(frozen=True)
class Clip:
    """One clip, a row for each of its captions, with so many tokens."""

    frames: int
    prompts: tuple[int, ...] = (4,)
    source: str = ""
    """Content of its file; empty: its own."""
    shard: int = 0
    height: int = 32
    width: int = 32
    extra: Mapping[str, Any] | None = None
    weights: tuple[float, ...] | None = None
    """Activity of its frames."""


def make_catalog(
    root: Path,
    clips: Sequence[Clip],
    *,
    geometry: Geometry = GEOMETRY,
    scaling: Scaling | None = None,
    prompt_width: int = 8,
    prompt_rows: int = 226,
    seed: int = 0,
) -> Catalog:
    """`seed` makes it another dataset (another fingerprint) of the same numbers."""
    root.mkdir(parents=True)
    shapes = sorted({(clip.frames, clip.height, clip.width) for clip in clips})
    config = PreprocessConfig(
        manifest="rows.jsonl",
        output=str(root),
        buckets=tuple(BucketConfig(num_frames=f, height=h, width=w) for f, h, w in shapes),
        frames=FramesConfig(policy="fps", target_fps=FPS + seed),
        text_encoder=TextEncoderConfig(max_length=prompt_rows),
    )
    card = make_card(
        config,
        video_fields={},
        text_fields={},
        scaling=scaling or Scaling(rule="factor", factor=0.7),
        geometry=geometry,
        versions={},
    )
    card_path(root).write_bytes(card_bytes(card))
    rows = []
    for number, clip in enumerate(clips):
        shape = [geometry.latent_frames(clip.frames), 16, clip.height // 8, clip.width // 8]
        source = clip.source or f"file {number}"
        for caption, prompt in enumerate(clip.prompts):
            nbytes = shape[0] * shape[1] * shape[2] * shape[3] * 4
            place = {"offset": 0, "checksum": ""}
            row = {
                "sample_id": sample_id(source, start_s=float(number), end_s=None, fingerprint="f"),
                "caption_digest": caption_digest(f"caption {caption}", fingerprint="f"),
                "shard": f"shard {clip.shard:03d}",
                "dtype": "F32",
                "shape": shape,
                "prompt_shard": "prompts",
                "prompt_embeds_dtype": "F32",
                "prompt_embeds_shape": [prompt, prompt_width],
                "num_frames": clip.frames,
                "bucket": bucket_name(
                    BucketConfig(num_frames=clip.frames, height=clip.height, width=clip.width)
                ),
                "source_digest": source,
                "effective_fps": FPS,
                "pts_s": [i / FPS for i in range(clip.frames)],
                "frame_weights": clip.weights,
                "extra": json.dumps(clip.extra) if clip.extra else "",
                **{f"{name}_{key}": value for name in card.latent_tensors for key, value in place.items()},
                **{f"prompt_embeds_{key}": value for key, value in place.items()},
                **{f"{name}_nbytes": nbytes for name in card.latent_tensors},
                "prompt_embeds_nbytes": prompt * prompt_width * 4,
            }
            rows.append(row)
    table = pa.Table.from_pylist(rows, schema=index_schema(card))
    (root / "index.parquet").write_bytes(sealed_parquet(table))
    catalog = Catalog(root)
    catalog.__dict__["empty_prompt_tokens"] = EMPTY_PROMPT  # what else only a whole dataset knows
    return catalog


def plan_config(
    *, stage: Mapping[str, Any] | None = None, data: Mapping[str, Any] | None = None, **others: Any
) -> TrainConfig:
    """A config of one stage, "all", with packs of 100 tokens."""
    return TrainConfig.model_validate(
        {
            "dataset": "set",
            "output": "run",
            "data": {"budget_tokens": 100, **(data or {})},
            "stages": [{"name": "all", "steps": 1000, "lr": {"peak": 1.0}, **(stage or {})}],
            **others,
        }
    )


def stage_plan(catalog: Catalog | Mixture, config: TrainConfig, **model: Any) -> StagePlan:
    mixture = catalog if isinstance(catalog, Mixture) else Mixture([catalog])
    weights = FrameWeights(mixture, keyframe_lambda=config.loss.keyframe_lambda)
    return StagePlan(mixture, config.stages[0], config, weights=weights, **model)


def video_tokens(clip: Clip, frames: int) -> int:
    """Of so many latent frames."""
    return frames * (clip.height // 8 // PATCH) * (clip.width // 8 // PATCH)
