"""The card of an imported dataset: what the cache says, what the VAE given says, and what nobody knows.

In: a survey of the cache and the encoders the user named. Out: a card whose hard field `imported_from` names
the format and what the cache tells of itself. Settings that are not known say so and are left empty, not
filled with defaults. Fields `video_encoder.*` are of the VAE given, which is what decodes the latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.imports.cache import Cache
from pipeline.imports.survey import LatentsFacts, PromptFacts
from pipeline.text_encode import TextEncoder
from pipeline.video_encode import VideoEncoder
from schemas.card import UNKNOWN, Card, CardSettings
from schemas.config import TargetConfig, TextEncoderConfig, VideoEncoderConfig
from schemas.load import digest_of

_UNKNOWN = ("frames", "resize", "picture", "decode", "video_encoder.compute_dtype")
"""Settings that no cache tells; nor whether its latents were encoded in tiles."""


@dataclass(frozen=True)
class Meaning:
    """What an import knows of a cache, beyond its files."""

    format: str
    says: Mapping[str, Any]
    has_captions: bool
    fps: float
    """Of the frames, as the user gave it."""
    left_out: Sequence[str]


def imported_card(
    meaning: Meaning,
    cache: Cache,
    *,
    latents: LatentsFacts,
    prompts: PromptFacts,
    video_config: VideoEncoderConfig,
    video: VideoEncoder,
    text_config: TextEncoderConfig | None,
    text: TextEncoder | None,
    versions: dict[str, str],
) -> Card:
    """The card of what this cache becomes; `text` encodes the empty prompt alone."""
    video_config = video_config.model_copy(update={"store": latents.store, "dtype": latents.dtype})
    hard: dict[str, dict[str, Any]] = {
        "latents": {
            "imported_from": {
                "format": meaning.format,
                "says": dict(meaning.says),
                "fps": meaning.fps,
                "left_out": sorted(meaning.left_out),
                "unscaled": cache.scaled,
            },
            "geometry.causal": latents.geometry.causal,
            "video_encoder.store": latents.store,
            "video_encoder.dtype": latents.dtype,
            "scaling": video.scaling.model_dump(mode="json"),
            **{f"video_encoder.{name}": value for name, value in video.hard_fields().items()},
            **dict.fromkeys(_UNKNOWN, UNKNOWN),
        },
        "prompts": {
            "imported_from": {
                "format": meaning.format,
                "captions": "in the cache" if meaning.has_captions else "not in the cache",
                "mask": "in the cache" if prompts.masked else "not in the cache: every row counts",
            },
            "text_encoder.padding": cache.padding,
            "text_encoder.max_length": prompts.length,
            "text_encoder.width": prompts.width,
            "text_encoder.dtype": prompts.dtype,
        },
    }
    if text is not None:
        fields = text.hard_fields()
        hard["prompts"] |= {f"empty_prompt.text_encoder.{name}": value for name, value in fields.items()}
    return Card(
        fingerprint=digest_of(hard),
        hard=hard,
        soft=versions,
        settings=CardSettings(
            buckets=latents.buckets,
            target=TargetConfig(),
            video_encoder=video_config,
            text_encoder=text_config,
        ),
        scaling=video.scaling,
        geometry=latents.geometry,
        image_scaling=video.image_scaling,
    )
