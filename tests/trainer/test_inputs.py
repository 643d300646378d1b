"""Latents or prompts that given weights do not know are refused by name before training starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from schemas.card import Card, make_card
from schemas.config import BucketConfig, PreprocessConfig, TextEncoderConfig
from schemas.errors import ConfigError
from schemas.model_weights import VAE_WEIGHTS, weight_files, weights_sha256
from schemas.scaling import ImageScaling, Scaling
from tests.pipeline.tiny_vaes import save_vae
from tests.trainer.datasets import GEOMETRY
from trainer.inputs import check_attention, check_inputs, inputs_of

COGVIDEOX = {"kind": "diffusers", "class": "AutoencoderKLCogVideoX"}
ROTARY, PLAIN = (
    {"use_rotary_positional_embeddings": rotary, "max_text_seq_length": 226} for rotary in (True, False)
)

T5_TEXT: dict[str, Any] = {
    "kind": "t5",
    "family": "cogvideox",
    "attention_mask": False,
    "pad_rows": "encoded",
    "config": {"model_type": "t5"},
}
WAN_TEXT: dict[str, Any] = {
    **T5_TEXT,
    "family": "wan",
    "attention_mask": True,
    "pad_rows": "zeros",
    "config": {"model_type": "umt5"},
}


def card(
    fields: dict[str, Any],
    *,
    factor: float = 0.7,
    image_scaling: ImageScaling | None = None,
    text: dict[str, Any] | None = None,
    rows: int = 226,
    padding: Literal["full", "trim"] = "full",
) -> Card:
    bucket = BucketConfig(num_frames=9, height=32, width=48)
    return make_card(
        PreprocessConfig(
            manifest="m",
            output="o",
            buckets=(bucket,),
            text_encoder=TextEncoderConfig(max_length=rows, padding=padding),
        ),
        video_fields=fields,
        text_fields=text or {},
        scaling=Scaling(rule="factor", factor=factor),
        geometry=GEOMETRY,
        versions={},
        image="apart" if image_scaling else "none",
        image_scaling=image_scaling or "as_video",
    )


def test_without_a_vae_the_class_of_the_transformer_says_what_it_takes(tmp_path: Path) -> None:
    check_inputs(card(COGVIDEOX), tmp_path, ROTARY)
    check_inputs(card(COGVIDEOX, factor=1.15258426), tmp_path, PLAIN)
    check_inputs(card({}), tmp_path, ROTARY)  # does not say
    with pytest.raises(ConfigError, match=r"encoded with AutoencoderKLWan, .* takes AutoencoderKLCogVideoX"):
        check_inputs(card({"kind": "diffusers", "class": "AutoencoderKLWan"}), tmp_path, ROTARY)
    images = {**ROTARY, "in_channels": 8, "out_channels": 4}
    check_inputs(card(COGVIDEOX, image_scaling="as_video"), tmp_path, images)
    check_inputs(card(COGVIDEOX, image_scaling="inverted"), tmp_path, {**images, "patch_size_t": 2})
    with pytest.raises(ConfigError, match=r"scaled 'inverted', those of CogVideoX 1\.0 'as_video'"):
        check_inputs(card(COGVIDEOX, image_scaling="inverted"), tmp_path, images)
    with pytest.raises(ConfigError, match=r"factor 0\.7, .* \(2B\) was trained with factor 1\.15258426"):
        check_inputs(card(COGVIDEOX), tmp_path, PLAIN)


def test_latents_of_the_embedded_codec_are_for_random_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"embedded codec dct.*model\.init = 'random'"):
        check_inputs(card({"kind": "dct"}), tmp_path, ROTARY)


def test_the_vae_of_the_same_pipeline_is_compared(tmp_path: Path) -> None:
    transformer = tmp_path / "transformer"
    vae = save_vae("cogvideox", tmp_path / "vae", scaling_factor=0.7)
    digest = weights_sha256(weight_files(vae, VAE_WEIGHTS, key="here"))
    check_inputs(card({**COGVIDEOX, "weights_sha256": digest}), transformer, PLAIN)
    with pytest.raises(ConfigError, match=rf"weights {'0' * 12}\.\.\., those in .*vae are {digest[:12]}"):
        check_inputs(card({**COGVIDEOX, "weights_sha256": "0" * 64}), transformer, PLAIN)
    with pytest.raises(ConfigError, match=r"scaling is factor 1\.2, .*vae has factor 0\.7"):
        check_inputs(card(COGVIDEOX, factor=1.2), transformer, PLAIN)
    with pytest.raises(
        ConfigError, match=r"encoded with AutoencoderKLWan, .*vae is a AutoencoderKLCogVideoX"
    ):
        check_inputs(card({"class": "AutoencoderKLWan"}), transformer, PLAIN)
    check_inputs(card(COGVIDEOX, image_scaling="as_video"), transformer, PLAIN)
    with pytest.raises(ConfigError, match=r"image latents are scaled 'inverted', those of .* 'as_video'"):
        check_inputs(card(COGVIDEOX, image_scaling="inverted"), transformer, PLAIN)


def test_a_vae_without_weights_is_compared_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    config = {"_class_name": "AutoencoderKLCogVideoX"}  # the factor of 2B is the default of the class
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    made = card({**COGVIDEOX, "weights_sha256": "0" * 64}, factor=1.15258426)
    check_inputs(made, tmp_path / "transformer", ROTARY)


def said(folder: Path, card: Card) -> Path:
    """What an export of a model trained on this card's dataset leaves."""
    folder.mkdir()
    (folder / "latents.json").write_text(json.dumps(inputs_of(card)))
    return folder


@pytest.mark.parametrize(
    "made",
    [
        card({"kind": "dct", "table_sha256": "1" * 64}, text={"kind": "tiny-t5", "weights_sha256": "2" * 64}),
        card({**COGVIDEOX, "weights_sha256": "1" * 64}, factor=1.15258426),  # with rotary positions
        card({"kind": "diffusers", "class": "AutoencoderKLWan"}, text={**WAN_TEXT}),
        card(COGVIDEOX, image_scaling="inverted"),
        card({}),
    ],
    ids=["dct", "2b's VAE", "wan", "images", "unknown"],
)
def test_a_model_that_was_trained_here_takes_what_it_was_trained_on(tmp_path: Path, made: Card) -> None:
    check_inputs(made, said(tmp_path / "model", made), ROTARY)


def test_what_a_model_says_itself_is_compared_field_by_field(tmp_path: Path) -> None:
    made = card({**COGVIDEOX, "weights_sha256": "1" * 64}, text=T5_TEXT)
    folder = said(tmp_path / "model", made)
    others = {
        r"video_encoder\.weights_sha256 is '2+', latents\.json has '1+'": card(
            {**COGVIDEOX, "weights_sha256": "2" * 64}, text=T5_TEXT
        ),
        r"scaling is .*0\.9": card({**COGVIDEOX, "weights_sha256": "1" * 64}, factor=0.9, text=T5_TEXT),
        r"text_encoder\.family is 'wan'": card({**COGVIDEOX, "weights_sha256": "1" * 64}, text=WAN_TEXT),
        r"video_encoder\.class is None, .*'AutoencoderKLCogVideoX'": card({"kind": "dct"}, text=T5_TEXT),
    }
    for message, other in others.items():
        with pytest.raises(ConfigError, match=message):
            check_inputs(other, folder, ROTARY)
    unknown = card({**COGVIDEOX, "weights_sha256": "unknown"}, text=T5_TEXT)
    check_inputs(unknown, folder, ROTARY)  # imported, from a cache that does not tell
    adopted = {"fields": {"video_encoder.weights_sha256": ["2" * 64, "1" * 64]}}
    check_inputs(
        card({**COGVIDEOX, "weights_sha256": "2" * 64}, text=T5_TEXT), folder, ROTARY, adoptions=[adopted]
    )


def test_prompts_are_those_of_a_cogvideox(tmp_path: Path) -> None:
    check_inputs(card(COGVIDEOX, text=T5_TEXT), tmp_path, ROTARY)
    for text in (WAN_TEXT, {**T5_TEXT, "attention_mask": True, "family": "wan"}):
        with pytest.raises(ConfigError, match=r"text_encoder\.family = 'wan', .* those of 'cogvideox'"):
            check_inputs(card(COGVIDEOX, text=text), tmp_path, ROTARY)
    with pytest.raises(ConfigError, match=r"text_encoder\.padding = 'trim', and the weights know"):
        check_inputs(card(COGVIDEOX, padding="trim"), tmp_path, ROTARY)


@pytest.mark.parametrize("rows", [16, 512])
def test_weights_from_elsewhere_know_as_many_rows_as_their_config_says(tmp_path: Path, rows: int) -> None:
    message = rf"prompts have {rows} rows, .* know 226 \(text_encoder\.max_length = 226\)"
    with pytest.raises(ConfigError, match=message):
        check_inputs(card(COGVIDEOX, text=T5_TEXT, rows=rows), tmp_path, ROTARY)
    check_inputs(card(COGVIDEOX, text=T5_TEXT, rows=rows), tmp_path, {**ROTARY, "max_text_seq_length": rows})


def test_weights_trained_here_know_the_rows_they_were_trained_on(tmp_path: Path) -> None:
    folder = said(tmp_path / "full", card(COGVIDEOX, text=T5_TEXT, rows=16))
    check_inputs(card(COGVIDEOX, text=T5_TEXT, rows=16), folder, ROTARY)
    with pytest.raises(ConfigError, match=r"max_length is 226, latents\.json has 16"):
        check_inputs(card(COGVIDEOX, text=T5_TEXT), folder, ROTARY)
    # Without pad rows the length is only where captions are cut.
    folder = said(tmp_path / "trim", card(COGVIDEOX, text=WAN_TEXT, rows=16, padding="trim"))
    check_inputs(card(COGVIDEOX, text=WAN_TEXT, padding="trim"), folder, ROTARY)


def test_the_text_encoder_of_the_same_pipeline_is_compared(tmp_path: Path) -> None:
    transformer, folder = tmp_path / "transformer", tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "t5"}')
    check_inputs(card(COGVIDEOX, text=T5_TEXT), transformer, ROTARY)
    with pytest.raises(ConfigError, match=r"its text encoder is a umt5, .*text_encoder is a t5"):
        check_inputs(card(COGVIDEOX, text={**T5_TEXT, "config": {"model_type": "umt5"}}), transformer, ROTARY)
    (folder / "model.safetensors").write_bytes(b"weights")
    digest = weights_sha256(weight_files(folder, "model", key="here"))
    check_inputs(card(COGVIDEOX, text={**T5_TEXT, "weights_sha256": digest}), transformer, ROTARY)
    with pytest.raises(
        ConfigError, match=rf"weights {'3' * 12}\.\.\., those in .*text_encoder are {digest[:12]}"
    ):
        check_inputs(card(COGVIDEOX, text={**T5_TEXT, "weights_sha256": "3" * 64}), transformer, ROTARY)


def test_an_adopted_vae_is_the_dataset_s_too(tmp_path: Path) -> None:
    vae = save_vae("cogvideox", tmp_path / "vae", scaling_factor=0.7)
    digest = weights_sha256(weight_files(vae, VAE_WEIGHTS, key="here"))
    made = card({**COGVIDEOX, "weights_sha256": "0" * 64})
    record = {"fields": {"video_encoder.weights_sha256": ["0" * 64, digest]}}
    check_inputs(made, tmp_path / "transformer", PLAIN, adoptions=[record])


def test_weights_that_learned_to_attend_otherwise_are_refused(tmp_path: Path) -> None:
    whole = {"local_frames": 0, "leading_frames": 1, "long_context": "none"}
    local = {"local_frames": 2, "leading_frames": 0, "long_context": "linear"}
    check_attention(local, tmp_path)  # nothing is said
    (tmp_path / "latents.json").write_text(json.dumps({"attention": whole}))
    check_attention(local, tmp_path)  # may be learned
    check_attention(whole | {"leading_frames": 0}, tmp_path)  # without spans none is led
    (tmp_path / "latents.json").write_text(json.dumps({"attention": local}))
    check_attention(local, tmp_path)
    for name, value in {"local_frames": 0, "leading_frames": 1, "long_context": "none"}.items():
        with pytest.raises(
            ConfigError, match=f"^stages.1.init.*: {name} is {value!r}, latents.json has"
        ) as caught:
            check_attention(local | {name: value}, tmp_path, key="stages.1.init")
        assert str(caught.value).count("latents.json has") == 1
