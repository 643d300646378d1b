"""A wrong VAE is refused by name before training starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.card import Card, make_card
from schemas.config import BucketConfig, PreprocessConfig
from schemas.errors import ConfigError
from schemas.model_weights import VAE_WEIGHTS, weight_files, weights_sha256
from schemas.scaling import ImageScaling, Scaling
from tests.pipeline.tiny_vaes import save_vae
from tests.trainer.datasets import GEOMETRY
from trainer.vae_match import check_vae

COGVIDEOX = {"kind": "diffusers", "class": "AutoencoderKLCogVideoX"}
ROTARY, PLAIN = ({"use_rotary_positional_embeddings": rotary} for rotary in (True, False))


def card(fields: dict[str, Any], *, factor: float = 0.7, image_scaling: ImageScaling | None = None) -> Card:
    bucket = BucketConfig(num_frames=9, height=32, width=48)
    return make_card(
        PreprocessConfig(manifest="m", output="o", buckets=(bucket,)),
        video_fields=fields,
        text_fields={},
        scaling=Scaling(rule="factor", factor=factor),
        geometry=GEOMETRY,
        versions={},
        image="apart" if image_scaling else "none",
        image_scaling=image_scaling or "as_video",
    )


def test_without_a_vae_the_class_of_the_transformer_says_what_it_takes(tmp_path: Path) -> None:
    check_vae(card(COGVIDEOX), tmp_path, ROTARY)
    check_vae(card(COGVIDEOX, factor=1.15258426), tmp_path, PLAIN)
    check_vae(card({}), tmp_path, ROTARY)  # does not say
    with pytest.raises(ConfigError, match=r"encoded with AutoencoderKLWan, .* takes AutoencoderKLCogVideoX"):
        check_vae(card({"kind": "diffusers", "class": "AutoencoderKLWan"}), tmp_path, ROTARY)
    with pytest.raises(ConfigError, match=r"factor 0\.7, .* \(2B\) was trained with factor 1\.15258426"):
        check_vae(card(COGVIDEOX), tmp_path, PLAIN)


def test_latents_of_the_embedded_codec_are_for_random_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"embedded codec dct.*model\.init = 'random'"):
        check_vae(card({"kind": "dct"}), tmp_path, ROTARY)


def test_the_vae_of_the_same_pipeline_is_compared(tmp_path: Path) -> None:
    transformer = tmp_path / "transformer"
    vae = save_vae("cogvideox", tmp_path / "vae", scaling_factor=0.7)
    digest = weights_sha256(weight_files(vae, VAE_WEIGHTS, key="here"))
    check_vae(card({**COGVIDEOX, "weights_sha256": digest}), transformer, PLAIN)
    with pytest.raises(ConfigError, match=rf"weights {'0' * 12}\.\.\., those in .*vae are {digest[:12]}"):
        check_vae(card({**COGVIDEOX, "weights_sha256": "0" * 64}), transformer, PLAIN)
    with pytest.raises(ConfigError, match=r"scaling is factor 1\.2, .*vae has factor 0\.7"):
        check_vae(card(COGVIDEOX, factor=1.2), transformer, PLAIN)
    with pytest.raises(
        ConfigError, match=r"encoded with AutoencoderKLWan, .*vae is a AutoencoderKLCogVideoX"
    ):
        check_vae(card({"class": "AutoencoderKLWan"}), transformer, PLAIN)
    check_vae(card(COGVIDEOX, image_scaling="as_video"), transformer, PLAIN)
    with pytest.raises(ConfigError, match=r"image latents are scaled 'inverted', those of .* 'as_video'"):
        check_vae(card(COGVIDEOX, image_scaling="inverted"), transformer, PLAIN)


def test_a_vae_without_weights_is_compared_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    config = {"_class_name": "AutoencoderKLCogVideoX"}  # the factor of 2B is the default of the class
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    made = card({**COGVIDEOX, "weights_sha256": "0" * 64}, factor=1.15258426)
    check_vae(made, tmp_path / "transformer", ROTARY)
