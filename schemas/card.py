"""The dataset card: what the numbers mean, and when they are stale.

`hard` fields change the stored numbers: a different one is refused, field by field, and two
fingerprints never mix in one dataset. `soft` fields (library versions) only warn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

import pydantic

from schemas.bucket import Geometry, bucket_name
from schemas.config import (
    AT_A_RATE,
    BucketConfig,
    DecodeConfig,
    FramesConfig,
    PictureConfig,
    PreprocessConfig,
    ResizeConfig,
    Settings,
    TargetConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
)
from schemas.errors import DatasetError
from schemas.load import digest_of, open_sealed_json, sealed_json
from schemas.patience import read_bytes
from schemas.sample import FORMAT_VERSION, Family, caption_digest
from schemas.scaling import ImageLatents, ImageScaling, Scaling
from schemas.store import location

DECODE_RULES = 2
"""Version of the rules that turn a file into frames (choice on timestamps, colour, rotation, resize);
raised when the same file and settings would give other pixels."""

UNKNOWN = "unknown"
"""Value of a hard field of imported latents that their cache does not tell."""


class CardSettings(Settings):
    """The settings that made the numbers, to repeat them (inspection) or to compare them.

    Those that are None are not known: the latents were imported from another trainer's cache.
    """

    frames: FramesConfig | None = None
    buckets: tuple[BucketConfig, ...]
    resize: ResizeConfig | None = None
    picture: PictureConfig | None = None
    decode: DecodeConfig | None = None
    target: TargetConfig
    video_encoder: VideoEncoderConfig
    text_encoder: TextEncoderConfig | None = None


class Card(Settings):
    """`card.json`."""

    format_version: int = FORMAT_VERSION
    fingerprint: str
    hard: dict[str, dict[str, Any]]
    """Family -> field -> value."""
    soft: dict[str, str]
    settings: CardSettings
    scaling: Scaling
    geometry: Geometry
    image: ImageLatents = "none"
    image_scaling: ImageScaling = "as_video"

    @property
    def stored(self) -> str:
        """`moments`, `mean` or `sample`."""
        return self.settings.video_encoder.store

    @property
    def imported_from(self) -> str | None:
        """The format of the cache it was imported from, such as "musubi"; None where it was encoded here."""
        told = self.hard["latents"].get("imported_from")
        return told and str(told["format"])

    @property
    def padding(self) -> Literal["full", "trim"]:
        """Whether prompts kept their pad rows."""
        return cast(Literal["full", "trim"], self.hard["prompts"]["text_encoder.padding"])

    @property
    def latent_tensors(self) -> tuple[str, ...]:
        """Names of a clip's tensors, [T, C, H, W]."""
        return ("mean", "logvar") if self.stored == "moments" else ("latents",)

    @property
    def image_tensors(self) -> tuple[str, ...]:
        """Names of those of its first frame alone, [1, C, H, W], where they are stored apart."""
        return tuple(f"image_{name}" for name in self.latent_tensors) if self.image == "apart" else ()

    def is_tiled(self, bucket: str) -> bool:
        """Whether clips of a bucket, by its name, are encoded in overlapping tiles."""
        return bool(self.hard["latents"].get("video_encoder.tiling", {}).get(bucket))

    def family_fingerprint(self, family: Family) -> str:
        return digest_of(self.hard[family])

    @property
    def empty_prompt(self) -> str:
        """Key of the empty caption, which every dataset holds in EMPTY_PROMPT_UNIT."""
        return caption_digest("", fingerprint=self.family_fingerprint("prompts"))


def make_card(
    config: PreprocessConfig,
    *,
    video_fields: dict[str, Any],
    text_fields: dict[str, Any],
    scaling: Scaling,
    geometry: Geometry,
    versions: dict[str, str],
    image: ImageLatents = "none",
    image_scaling: ImageScaling = "as_video",
) -> Card:
    """The card a run of `config` would write; encoders bring their own hard fields."""
    frames = config.frames
    latents: dict[str, Any] = {
        "decode_rules": DECODE_RULES,
        "identity": config.identity,
        "frames.policy": frames.policy,
        "frames.short": frames.short,
        "buckets": sorted(bucket_name(bucket) for bucket in config.buckets),
        "resize.mode": config.resize.mode,
        **{f"picture.{name}": value for name, value in config.picture.model_dump(mode="json").items()},
        "decode.backend": config.decode.backend,
        "video_encoder.store": config.video_encoder.store,
        "video_encoder.dtype": config.video_encoder.dtype,
        "scaling": scaling.model_dump(mode="json"),
        **{f"video_encoder.{name}": value for name, value in video_fields.items()},
    }
    if frames.max_slowdown is not None:
        latents["frames.max_slowdown"] = frames.max_slowdown
    if frames.policy == "keyframe":
        latents |= {"frames.boost": frames.boost, "frames.activity": frames.activity}
    if frames.policy in AT_A_RATE:
        latents |= {"frames.target_fps": frames.target_fps, "frames.clips": frames.clips}
    if frames.clips == "slide":
        latents["frames.slide_step"] = frames.slide_step
    if frames.clips == "whole":  # then how long a clip is follows from what it must fit
        latents |= {f"target.{name}": value for name, value in config.target.model_dump().items()}
        if config.target.token_multiple > 1:
            latents["target.text_length"] = config.text_encoder.max_length
    if config.decode.device != "cpu":
        latents["decode.device"] = config.decode.device
    if config.decode.threads > 1:  # the pictures are the same, what the records say of the decode is not
        latents["decode.threads"] = config.decode.threads
    if config.video_encoder.store == "sample":
        latents["seed"] = config.seed
    prompts = {
        "text_encoder.max_length": config.text_encoder.max_length,
        "text_encoder.padding": config.text_encoder.padding,
        **{f"text_encoder.{name}": value for name, value in text_fields.items()},
    }
    hard = {"latents": latents, "prompts": prompts}
    return Card(
        fingerprint=digest_of(hard),
        hard=hard,
        soft=versions,
        settings=CardSettings(
            frames=frames,
            buckets=config.buckets,
            resize=config.resize,
            picture=config.picture,
            decode=config.decode,
            target=config.target,
            video_encoder=config.video_encoder,
            text_encoder=config.text_encoder,
        ),
        scaling=scaling,
        geometry=geometry,
        image=image,
        image_scaling=image_scaling,
    )


def card_path(dataset: str | Path) -> Path:
    return location(dataset) / "card.json"


def card_bytes(card: Card) -> bytes:
    return sealed_json(card.model_dump(mode="json"))


def read_card(dataset: str | Path) -> Card:
    """The card of a dataset; DatasetError where there is none, it is damaged, or of another format."""
    path = card_path(dataset)
    try:
        tree = open_sealed_json(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(f"{dataset} is not a latent dataset: it has no card.json") from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} is damaged: {error}") from error
    if tree.get("format_version") != FORMAT_VERSION:
        raise DatasetError(
            f"{path}: expected format_version {FORMAT_VERSION}, found {tree.get('format_version')!r}; "
            "run `latentpress preprocess` with this version into a new folder"
        )
    try:
        return Card.model_validate_json(json.dumps(tree))
    except pydantic.ValidationError as error:
        raise DatasetError(f"{path} is damaged: {error}") from error


def hard_differences(have: Card, want: Card) -> dict[str, tuple[Any, Any]]:
    """Field -> (card, config) for every hard field that differs."""
    differences = {}
    for family in ("latents", "prompts"):
        old, new = have.hard[family], want.hard[family]
        for field in sorted(old.keys() | new.keys()):
            if old.get(field) != new.get(field):
                differences[field] = (old.get(field), new.get(field))
    return differences
