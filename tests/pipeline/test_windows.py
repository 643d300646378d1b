"""Windows of a long clip: exact where the encoder groups frames alike and never looks ahead, or told."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.segments import Segmented
from pipeline.video_encode import VideoEncoder, load_video_encoder
from pipeline.windows import SECONDS, Drift, drifts
from schemas.config import VideoEncoderConfig
from schemas.windows import prefix_frames
from tests.pipeline.test_dct import waves

FPS = 4.0
"""Windows of 3, 9 and 18 s are 13, 37 and 73 frames."""


def frames(num_frames: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    moving = waves(num_frames, 32, 32).astype(np.float32) + rng.normal(0, 20, (num_frames, 32, 32, 3))
    return moving.clip(0, 255).astype(np.uint8)


def dct() -> VideoEncoder:
    return load_video_encoder(VideoEncoderConfig())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VideoEncoder]:
    """Two real VAEs with tiny random weights, by class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
    sizes: dict[type, dict[str, Any]] = {
        AutoencoderKLCogVideoX: {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 2},
        AutoencoderKLWan: {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    }
    encoders = {}
    for kind, size in sizes.items():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("vae") / "vae"
        kind(**size).save_pretrained(folder)
        config = VideoEncoderConfig(kind="diffusers", model=str(folder), device="cpu")
        encoders[kind.__name__.removeprefix("AutoencoderKL")] = load_video_encoder(config)
    return encoders


def found(encoder: VideoEncoder, num_frames: int) -> dict[float, Drift]:
    clip = {
        "pts_s": np.arange(num_frames) / FPS,
        "offsets": np.array([0, num_frames]),
        "fps": np.array([FPS]),
    }
    rules: dict[str, Any] = {**clip, "frames": None, "geometry": encoder.geometry}
    windows = {seconds: int(prefix_frames(**rules, max_s=seconds)[0]) for seconds in SECONDS}
    return {each.seconds: each for each in drifts(encoder, frames(num_frames), windows=windows)}


def test_windows_that_are_shorter_than_the_clip() -> None:
    assert found(dct(), 13) == {}
    windows = found(dct(), 77)
    assert [(each.num_frames, each.latent_frames) for each in windows.values()] == [
        (13, 4),
        (37, 10),
        (73, 19),
    ]
    assert list(windows[9.0].places) == [1, 6]


def test_groups_of_four_know_nothing_of_each_other() -> None:
    """`dct`: only the first frame of a clip is encoded in another way than the others."""
    for each in found(dct(), 77).values():
        assert each.prefix == 0
        assert each.first > 0
        assert each.interior[0] > 0.01
        assert not any(each.interior[1:])


class Louder:
    """An encoder whose latents are ten times as large and lie elsewhere."""

    def __init__(self, encoder: VideoEncoder) -> None:
        self._encoder, self.geometry, self.scaling = encoder, encoder.geometry, encoder.scaling

    def encode(self, frames: np.ndarray, *, tiled: bool = False) -> dict[str, torch.Tensor]:
        return {"mean": 10 * self._encoder.encode(frames, tiled=tiled)["mean"] + 3}


def test_differences_are_in_deviations_of_the_latents(tiny: dict[str, VideoEncoder]) -> None:
    loud: Any = Louder(tiny["CogVideoX"])
    plain, louder = found(tiny["CogVideoX"], 41), found(loud, 41)
    for seconds, each in plain.items():
        assert louder[seconds].prefix == pytest.approx(each.prefix, rel=1e-3)
        assert louder[seconds].interior == pytest.approx(each.interior, rel=1e-3)
        assert 0.1 < max(each.interior) < 3


def test_wan_never_looks_ahead(tiny: dict[str, VideoEncoder]) -> None:
    for num_frames in (41, 45):
        windows = found(tiny["Wan"], num_frames)
        assert [each.prefix for each in windows.values()] == [0, 0]
        assert windows[9.0].interior[0] > 2 * windows[9.0].interior[-1] > 0


def test_cogvideox_is_exact_where_its_groups_of_eight_fall_alike(tiny: dict[str, VideoEncoder]) -> None:
    """Its norms see 8 frames at once, the first time 8 more than the rest of a division by 8."""
    windows = {num_frames: found(tiny["CogVideoX"], num_frames) for num_frames in (41, 45)}
    assert {n: {s: each.prefix > 0 for s, each in of.items()} for n, of in windows.items()} == {
        41: {3.0: True, 9.0: True},
        45: {3.0: False, 9.0: False},
    }
    assert (41 % 8, 45 % 8, 13 % 8, 37 % 8) == (1, 5, 5, 5)


@pytest.mark.parametrize("name", ["CogVideoX", "Wan"])
def test_pieces_are_exact_for_any_encoder(tiny: dict[str, VideoEncoder], name: str) -> None:
    for each in found(Segmented(tiny[name], 13), 13 * 4).values():
        assert each.num_frames % 13 == 0
        assert each.first % 4 == 0 < each.first
        assert each.prefix == 0
        assert not any(each.interior)
