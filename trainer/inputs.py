"""Whether a dataset's latents and prompts are those that given weights know; refused by name if not.

In: the dataset's card and the folder of a transformer. What was trained here says it itself: a checkpoint
keeps `inputs_of` its card, and export writes that as latents.json beside config.json, with what tokens
attended to, which config.json has no place for. Without that file the VAE and the text encoder of the same
pipeline are compared, and without those, what the class of transformer implies. A card that does not say is
believed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers

from schemas.card import UNKNOWN, Card
from schemas.errors import ConfigError
from schemas.model_weights import VAE_WEIGHTS, read_model_json, weight_files, weights_sha256
from schemas.sample import Family
from schemas.scaling import Scaling
from schemas.vae_rules import VAE_RULES, vae_image_scaling, vae_scaling

INPUTS_NAME = "latents.json"
_COGVIDEOX = "AutoencoderKLCogVideoX"
_FACTOR_2B, _FACTOR_5B = 1.15258426, 0.7
"""config.scaling_factor of the published VAEs: of 2B (no rotary positions) and of the others."""
_FIELDS: dict[Family, tuple[str, ...]] = {
    "latents": (
        *(f"video_encoder.{name}" for name in ("kind", "class", "weights_sha256", "table_sha256")),
        "scaling",
    ),
    "prompts": tuple(
        f"text_encoder.{name}"
        for name in ("kind", "family", "attention_mask", "pad_rows", "padding", "weights_sha256")
    ),
}
"""Hard fields of a card that say what the numbers mean to a model; the others only what was encoded."""
_ROWS = "text_encoder.max_length"
"""Rows of a prompt that keeps its pad rows."""


def inputs_of(card: Card) -> dict[str, dict[str, Any]]:
    """What latents and prompts of a dataset are, JSON values, as far as its card says."""
    told: dict[str, dict[str, Any]] = {
        family: {name: card.hard[family][name] for name in names if name in card.hard[family]}
        for family, names in _FIELDS.items()
    }
    if card.image != "none":
        told["latents"] |= {"image": card.image, "image_scaling": card.image_scaling}
    if card.padding == "full":  # models here attend to all rows of a prompt, so their number counts too
        told["prompts"][_ROWS] = card.hard["prompts"][_ROWS]
    return told


def check_inputs(
    card: Card,
    transformer: Path,
    config: Mapping[str, Any],
    *,
    adoptions: Sequence[Mapping[str, Any]] = (),
    key: str = "model.init",
) -> None:
    """ConfigError where latents or prompts of `card` are not those that the weights in `transformer` know:
    another encoder, scaling or number of rows.

    `config` holds all arguments of its CogVideoXTransformer3DModel; `adoptions` are the records of the
    dataset, whose values count as the card's. `key` is the setting that names it, for messages.
    """
    said = transformer / INPUTS_NAME
    if said.is_file():
        problems = list(_unlike_said(card, read_model_json(said, key=key), adoptions))
    else:
        problems = [
            *_unlike_published(card, transformer, config, adoptions, key),
            *_unlike_prompts(card, transformer, config, adoptions, key),
        ]
    if problems:
        raise ConfigError(
            f"{key} = {str(transformer)!r}: the dataset is not what these weights were trained on: "
            f"{'; '.join(problems)}. Preprocess with the encoders of the model, or train with "
            f"{key} = 'random'"
        )


def check_attention(attention: Mapping[str, Any], transformer: Path, *, key: str = "model.init") -> None:
    """ConfigError where the weights in `transformer` were trained with other local attention or long context.

    `attention` is `Architecture.attention`. Weights that attended over whole clips may learn to do without.
    """
    said = transformer / INPUTS_NAME
    known = read_model_json(said, key=key).get("attention") if said.is_file() else None
    if not isinstance(known, dict):
        return
    names = ["local_frames", "leading_frames"] if known.get("local_frames") else []
    names += ["long_context"] if known.get("long_context", "none") != "none" else []
    wrong = [
        f"{name} is {attention[name]!r}, {INPUTS_NAME} has {known.get(name)!r}"
        for name in names
        if attention[name] != known.get(name)
    ]
    if wrong:
        raise ConfigError(
            f"{key} = {str(transformer)!r}: these weights were trained to attend otherwise: "
            f"{'; '.join(wrong)}; set model.local_frames and model.long_context as they had them "
            f'(leading_frames is the dataset\'s), or remove "attention" from {INPUTS_NAME} to teach them anew'
        )


def _unlike_said(
    card: Card, said: Mapping[str, Any], adoptions: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    have = inputs_of(card)
    for family in have:
        known = said.get(family)
        for field, value in (known if isinstance(known, dict) else {}).items():
            if field.startswith("image") and "image" not in have[family]:
                continue  # a dataset may do without them
            found = have[family].get(field)
            if UNKNOWN not in (value, found) and value not in (found, *_adopted(field, adoptions)):
                yield f"its {field} is {found!r}, {INPUTS_NAME} has {value!r}"


def _unlike_published(
    card: Card,
    transformer: Path,
    config: Mapping[str, Any],
    adoptions: Sequence[Mapping[str, Any]],
    key: str,
) -> Iterator[str]:
    made = card.hard["latents"]
    name = made.get("video_encoder.class")
    if made.get("video_encoder.kind") == "dct":
        yield (
            f"it was encoded with the embedded codec dct, which is for trials, the weights know latents of "
            f"{_COGVIDEOX}"
        )
    elif name is not None:
        vae = _beside(transformer, "vae")
        if vae is None:
            yield from _unlike_implied(card, name, config)
        else:
            yield from _unlike_vae(card, name, vae, adoptions, key)


def _unlike_implied(card: Card, name: str, config: Mapping[str, Any]) -> Iterator[str]:
    if name != _COGVIDEOX:
        yield f"it was encoded with {name}, a CogVideoXTransformer3DModel takes {_COGVIDEOX}"
        return
    rotary = config["use_rotary_positional_embeddings"]
    factor = _FACTOR_5B if rotary else _FACTOR_2B
    if not _alike(card.scaling, Scaling(rule="factor", factor=factor)):
        family = "with rotary positions (5B, 1.5)" if rotary else "without rotary positions (2B)"
        yield f"its scaling is {_told(card.scaling)}, a CogVideoX {family} was trained with factor {factor}"
    image = "inverted" if config.get("patch_size_t") else "as_video"
    takes_images = config.get("in_channels", 0) > config.get("out_channels", 0)
    if takes_images and card.image != "none" and card.image_scaling != image:
        version = "1.5" if config.get("patch_size_t") else "1.0"
        yield f"its image latents are scaled {card.image_scaling!r}, those of CogVideoX {version} {image!r}"


def _unlike_vae(
    card: Card, name: str, folder: Path, adoptions: Sequence[Mapping[str, Any]], key: str
) -> Iterator[str]:
    vae = read_model_json(folder / "config.json", key=key)
    expected = vae.get("_class_name")
    if name != expected:
        yield f"it was encoded with {name}, {folder} is a {expected}"
        return
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    arguments = {**{key: each.default for key, each in parameters.items()}, **vae}
    if VAE_RULES[name] == "factor":
        scaling = vae_scaling(name, arguments)
        if not _alike(card.scaling, scaling):
            yield f"its scaling is {_told(card.scaling)}, {folder} has {_told(scaling)}"
    if card.image != "none" and card.image_scaling != (image := vae_image_scaling(arguments)):
        yield f"its image latents are scaled {card.image_scaling!r}, those of {folder} {image!r}"
    yield from _other_weights(
        card, "latents", "video_encoder.weights_sha256", folder, VAE_WEIGHTS, adoptions, key
    )


def _unlike_prompts(
    card: Card,
    transformer: Path,
    config: Mapping[str, Any],
    adoptions: Sequence[Mapping[str, Any]],
    key: str,
) -> Iterator[str]:
    """A CogVideoX takes the T5 of its pipeline, run without a mask, with the pad rows as that made them, and
    as many rows as its config says: so many its pipeline and the training scripts give it."""
    made = card.hard["prompts"]
    rows = config["max_text_seq_length"]
    if card.padding == "trim":
        yield (
            "it has text_encoder.padding = 'trim', and the weights know prompts with their pad rows, which "
            "no mask hides (text_encoder.padding = 'full')"
        )
    elif made[_ROWS] != rows:
        yield (
            f"its prompts have {made[_ROWS]} rows, pad rows among them, which no mask hides, and the weights "
            f"know {rows} (text_encoder.max_length = {rows})"
        )
    if made.get("text_encoder.kind") != "t5":
        return
    if made.get("text_encoder.pad_rows") != "encoded" or made.get("text_encoder.attention_mask"):
        yield (
            f"its prompts are those of text_encoder.family = {made.get('text_encoder.family')!r}, the "
            "weights know those of 'cogvideox'"
        )
    folder = _beside(transformer, "text_encoder")
    if folder is None:
        return
    expected = read_model_json(folder / "config.json", key=key).get("model_type")
    found = made.get("text_encoder.config", {}).get("model_type")
    if found != expected:
        yield f"its text encoder is a {found}, {folder} is a {expected}"
        return
    yield from _other_weights(card, "prompts", "text_encoder.weights_sha256", folder, "model", adoptions, key)


def _other_weights(
    card: Card,
    family: Family,
    field: str,
    folder: Path,
    name: str,
    adoptions: Sequence[Mapping[str, Any]],
    key: str,
) -> Iterator[str]:
    """Where weights are in `folder`: a transformer is often kept with the configs of the others alone."""
    made = card.hard[family].get(field)
    try:
        files = weight_files(folder, name, key=key)
    except ConfigError:
        return
    known = (made, *_adopted(field, adoptions))
    if made not in (None, UNKNOWN) and (found := weights_sha256(files)) not in known:
        yield f"it was encoded with weights {made[:12]}..., those in {folder} are {found[:12]}..."


def _beside(transformer: Path, part: str) -> Path | None:
    """The folder of another part of the transformer's pipeline."""
    folders = (transformer.parent / part, transformer / part)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _adopted(field: str, adoptions: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [record["fields"][field][1] for record in adoptions if field in record["fields"]]


def _alike(one: Scaling, other: Scaling) -> bool:
    return (one.rule, one.shift) == (other.rule, other.shift) and math.isclose(one.factor, other.factor)


def _told(scaling: Scaling) -> str:
    return f"{scaling.rule} {scaling.factor}" if scaling.rule == "factor" else scaling.rule
