"""The encoder interface: what `dct` gives through it, and what of a posterior is stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline import dct
from pipeline.video_encode import load_video_encoder, stored_latents
from schemas.codec import as_float32
from schemas.config import VideoEncoderConfig
from tests.pipeline.test_dct import noise

SHAPE = (3, 16, 8, 8)


def moments() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "mean": torch.randn(SHAPE, generator=generator),
        "logvar": torch.randn(SHAPE, generator=generator) - 2,
    }


def test_encoding_is_the_codec_clip_by_clip() -> None:
    encoder = load_video_encoder(VideoEncoderConfig())
    clips = noise(15, 16, 24).reshape(3, 5, 16, 24, 3)
    together = encoder.encode(clips)
    assert set(together) == {"mean", "logvar"}
    assert together["mean"].shape == together["logvar"].shape == (3, 2, 16, 2, 3)
    assert torch.equal(together["logvar"], torch.full((3, 2, 16, 2, 3), -30.0))
    for clip, mean in zip(clips, together["mean"], strict=True):
        assert torch.equal(encoder.encode(clip[None])["mean"][0], mean)
        np.testing.assert_array_equal(mean, dct.encode_frames(clip))
    np.testing.assert_array_equal(encoder.decode(mean.numpy()), dct.decode_latents(mean.numpy()))


def test_geometry_names_the_shape_that_encoding_gives() -> None:
    encoder = load_video_encoder(VideoEncoderConfig())
    mean = encoder.encode(noise(9, 32, 16)[None])["mean"][0]
    assert mean.shape == (encoder.geometry.latent_frames(9), encoder.geometry.channels, 4, 2)
    assert len(encoder.scaling.mean) == encoder.geometry.channels


def test_hard_fields_name_the_codec() -> None:
    fields = load_video_encoder(VideoEncoderConfig()).hard_fields()
    assert fields == {"kind": "dct", "table_sha256": dct.table_digest()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_moments_and_mean_are_stored_in_the_asked_type(dtype: str) -> None:
    given = moments()
    config = VideoEncoderConfig.model_validate({"dtype": dtype, "store": "moments"})
    stored = stored_latents(given, config=config, seed=0, sample_id="a")
    assert list(stored) == ["mean", "logvar"]
    for name, tensor in stored.items():
        want = given[name].to(getattr(torch, dtype)).float()
        np.testing.assert_array_equal(as_float32(tensor), want)
    only = stored_latents(given, config=config.model_copy(update={"store": "mean"}), seed=0, sample_id="a")
    assert list(only) == ["latents"]
    np.testing.assert_array_equal(only["latents"].data, stored["mean"].data)


def test_a_sample_depends_on_seed_and_id_alone() -> None:
    config = VideoEncoderConfig(store="sample")

    def draw(seed: int, sample_id: str) -> np.ndarray:
        return stored_latents(moments(), config=config, seed=seed, sample_id=sample_id)["latents"].data

    first = draw(0, "a")
    torch.manual_seed(7)
    np.random.seed(7)
    np.testing.assert_array_equal(draw(0, "a"), first)
    assert not np.array_equal(draw(1, "a"), first)
    assert not np.array_equal(draw(0, "b"), first)
    noise = (first - moments()["mean"].numpy()) / np.exp(0.5 * moments()["logvar"].numpy())
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_a_deterministic_encoder_samples_its_mean() -> None:
    given = {"mean": moments()["mean"], "logvar": torch.full(SHAPE, -30.0)}
    sample = stored_latents(given, config=VideoEncoderConfig(store="sample"), seed=0, sample_id="a")
    np.testing.assert_allclose(sample["latents"].data, given["mean"], atol=3e-6)
