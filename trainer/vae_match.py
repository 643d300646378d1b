"""Whether the VAE of a dataset is the one that a published model was trained on; refused by name if not.

In: the dataset's card and the folder of a transformer. With the VAE of the same pipeline beside it, class,
scaling and weights are compared; without, what the transformer's class implies. A card that does not name
its VAE is believed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers

from schemas.card import Card
from schemas.errors import ConfigError
from schemas.model_weights import VAE_WEIGHTS, read_model_json, weight_files, weights_sha256
from schemas.scaling import Scaling
from schemas.vae_rules import VAE_RULES, vae_image_scaling, vae_scaling

_KEY = "model.init"
_COGVIDEOX = "AutoencoderKLCogVideoX"
_FACTOR_2B, _FACTOR_5B = 1.15258426, 0.7
"""config.scaling_factor of the published VAEs: of 2B (no rotary positions) and of the others."""


def check_vae(card: Card, transformer: Path, config: Mapping[str, Any]) -> None:
    """ConfigError where the latents of `card` are not those that the weights in `transformer` know.

    `config` holds all arguments of its CogVideoXTransformer3DModel.
    """
    made = card.hard["latents"]
    name = made.get("video_encoder.class")
    if made.get("video_encoder.kind") == "dct":
        raise ConfigError(
            f"{_KEY} = {str(transformer)!r} are weights for latents of {_COGVIDEOX}, the dataset was encoded "
            "with the embedded codec dct, which is for trials: train on it with model.init = 'random', or "
            "preprocess with video_encoder.kind = 'diffusers'"
        )
    if name is None:
        return
    folders = (transformer.parent / "vae", transformer / "vae")
    beside = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    problems = list(_unlike_implied(card, name, config) if beside is None else _unlike(card, name, beside))
    if problems:
        raise ConfigError(
            f"{_KEY} = {str(transformer)!r}: the dataset has another VAE: {'; '.join(problems)}"
        )


def _unlike_implied(card: Card, name: str, config: Mapping[str, Any]) -> Iterator[str]:
    if name != _COGVIDEOX:
        yield f"it was encoded with {name}, a CogVideoXTransformer3DModel takes {_COGVIDEOX}"
        return
    rotary = config["use_rotary_positional_embeddings"]
    factor = _FACTOR_5B if rotary else _FACTOR_2B
    if not _alike(card.scaling, Scaling(rule="factor", factor=factor)):
        family = "with rotary positions (5B, 1.5)" if rotary else "without rotary positions (2B)"
        yield f"its scaling is {_told(card.scaling)}, a CogVideoX {family} was trained with factor {factor}"


def _unlike(card: Card, name: str, folder: Path) -> Iterator[str]:
    vae = read_model_json(folder / "config.json", key=_KEY)
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
    made = card.hard["latents"].get("video_encoder.weights_sha256")
    try:
        files = weight_files(folder, VAE_WEIGHTS, key=_KEY)
    except ConfigError:  # a transformer is often kept with the VAE's config alone
        return
    if made and made != (found := weights_sha256(files)):
        yield f"it was encoded with weights {made[:12]}..., those in {folder} are {found[:12]}..."


def _alike(one: Scaling, other: Scaling) -> bool:
    return (one.rule, one.shift) == (other.rule, other.shift) and math.isclose(one.factor, other.factor)


def _told(scaling: Scaling) -> str:
    return f"{scaling.rule} {scaling.factor}" if scaling.rule == "factor" else scaling.rule
