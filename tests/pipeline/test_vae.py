"""Every VAE family: our moments against the library's on the same frames, and what the card says of it."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from pipeline.vae_model import VaeModel
from pipeline.video_encode import VideoEncoder, load_video_encoder, stored_latents
from schemas.bucket import Geometry
from schemas.config import VideoEncoderConfig
from schemas.errors import ConfigError
from tests.pipeline.tiny_vaes import FAMILIES, library_frames, library_vae, save_vae

BY_FRAME = ("image", "temporal_decoder")
GEOMETRY = {
    "cogvideox": Geometry(4, 8, 4),
    "wan2.1": Geometry(4, 8, 16),
    "wan2.2": Geometry(4, 16, 16),
    "hunyuanvideo": Geometry(4, 8, 4),
    "hunyuanvideo1.5": Geometry(4, 16, 4),
    "ltx": Geometry(8, 32, 8),
    "ltx2": Geometry(8, 32, 8),
    "mochi": Geometry(6, 8, 12),
    "allegro": Geometry(4, 8, 4, causal=False, windows=((24, 16), (136, 16), (136, 56))),
    "cosmos": Geometry(8, 8, 16),
    "magvit": Geometry(4, 8, 4),
    "qwenimage": Geometry(4, 8, 16),
    "image": Geometry(1, 8, 4),
    "temporal_decoder": Geometry(1, 8, 4),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's VAE, saved once."""
    root = tmp_path_factory.mktemp("vaes")

    def folder(family: str) -> Path:
        return root / family if (root / family).is_dir() else save_vae(family, root / family)

    return folder


def load(folder: Path, **settings: Any) -> VideoEncoder:
    return load_video_encoder(
        VideoEncoderConfig(kind="diffusers", model=str(folder), **{"device": "cpu", **settings})
    )


def clip_shape(family: str) -> tuple[int, int, int]:
    """Several pieces in time, of a picture that is not square; one of Allegro's windows, which are large."""
    if family == "allegro":
        return 24, 136, 136
    if family.startswith("ltx"):
        return 25, 64, 96
    return 5 if family in BY_FRAME else 25, 32, 48


def draw(family: str, num_clips: int = 1) -> np.ndarray:
    shape = (num_clips, *clip_shape(family), 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def library_moments(vae: Any, clips: np.ndarray, *, by_frame: bool) -> list[dict[str, torch.Tensor]]:
    """Of every clip, one call each, or one a frame."""
    found = []
    with torch.no_grad():
        for frames in library_frames(clips):
            pictures = frames.transpose(0, 1).contiguous().split(1) if by_frame else [frames[None]]
            parts = [vae.encode(picture).latent_dist for picture in pictures]
            mean = torch.cat([part.mode() for part in parts], 0 if by_frame else 2)
            logvar = torch.full_like(mean, -30.0)
            if isinstance(parts[0], DiagonalGaussianDistribution):
                logvar = torch.cat([part.logvar for part in parts], 0 if by_frame else 2)
            moments = {"mean": mean, "logvar": logvar}
            found.append(
                {name: each if by_frame else each[0].transpose(0, 1) for name, each in moments.items()}
            )
    return found


@every_family
def test_moments_are_the_library_s_and_decode_back(family: str, saved: Callable[[str], Path]) -> None:
    encoder, vae = load(saved(family)), library_vae(family, saved(family))
    clips = draw(family, 2)
    wanted = library_moments(vae, clips, by_frame=family in BY_FRAME)
    for clip, want in zip(clips, wanted, strict=True):
        alone = encoder.encode(clip[None])
        for name in ("mean", "logvar"):
            assert torch.equal(alone[name][0], want[name])
    together = encoder.encode(clips)
    for i, want in enumerate(wanted):
        for name in ("mean", "logvar"):
            torch.testing.assert_close(together[name][i], want[name], atol=1e-5, rtol=1e-5)

    frames, height, width = clip_shape(family)
    geometry = encoder.geometry
    assert geometry == GEOMETRY[family]
    cells = (height // geometry.spatial, width // geometry.spatial)
    assert together["mean"].shape == (2, geometry.latent_frames(frames), geometry.channels, *cells)
    decoded = encoder.decode(together["mean"][0].numpy())
    assert decoded.dtype == np.uint8
    assert decoded.shape == (frames, height, width, 3)


@pytest.mark.parametrize("family", ["cogvideox", "wan2.1", "image", "temporal_decoder"])
def test_decoded_pictures_are_the_library_s(family: str, saved: Callable[[str], Path]) -> None:
    encoder, vae = load(saved(family)), library_vae(family, saved(family))
    latents = encoder.encode(draw(family))["mean"][0]
    with torch.no_grad():
        if family == "image":
            pixels = torch.cat([vae.decode(each).sample for each in latents.split(1)])
        elif family == "temporal_decoder":
            pixels = vae.decode(latents, num_frames=len(latents)).sample
        else:
            pixels = vae.decode(latents.transpose(0, 1)[None]).sample[0].transpose(0, 1)
    want = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    np.testing.assert_array_equal(encoder.decode(latents.numpy()), want)


def test_cogvideox_decodes_as_many_frames_as_it_was_given(saved: Callable[[str], Path]) -> None:
    encoder = load(saved("cogvideox"))
    for frames in (5, 9, 13, 17):
        latents = encoder.encode(draw("cogvideox")[:, :frames])["mean"][0].numpy()
        assert len(encoder.decode(latents)) == frames


FIRST_LATENT = {
    **dict.fromkeys(FAMILIES, "first_latent"),
    "cogvideox": "apart",  # its norms average over the frames of a piece
    "hunyuanvideo": "apart",
}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("allegro", "temporal_decoder")])
def test_where_the_first_frame_alone_is_is_found_by_a_trial(
    family: str, saved: Callable[[str], Path]
) -> None:
    assert load(saved(family)).image == "none"
    encoder = load(saved(family), image_latents=True)
    assert encoder.image == FIRST_LATENT[family]
    assert encoder.hard_fields()["image_latents"] == encoder.image
    clips = draw(family)
    alone = library_moments(library_vae(family, saved(family)), clips[:, :1], by_frame=family in BY_FRAME)[0]
    moments = encoder.encode(clips)
    first = {name: moments[name][0, :1] for name in ("mean", "logvar")}
    if encoder.image == "first_latent":
        assert set(moments) == {"mean", "logvar"}
        torch.testing.assert_close(first, alone, atol=1e-4, rtol=1e-3)
    else:
        assert not torch.allclose(first["mean"], alone["mean"], atol=1e-2)
        for name in ("mean", "logvar"):
            assert torch.equal(moments[f"image_{name}"][0], alone[name])
    config = VideoEncoderConfig(store="sample")
    tensors = stored_latents(
        {name: values[0] for name, values in moments.items()}, config=config, seed=0, sample_id="a"
    )
    assert set(tensors) == ({"latents", "image_latents"} if encoder.image == "apart" else {"latents"})


def test_an_encoder_without_a_first_frame_says_so(saved: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"AutoencoderKLAllegro takes 16n \+ 24 frames"):
        load(saved("allegro"), image_latents=True).hard_fields()
    with pytest.raises(ConfigError, match="Stable Video Diffusion adds noise to a picture before"):
        load(saved("temporal_decoder"), image_latents=True).hard_fields()


def test_a_model_is_described_and_tried_once_and_not_where_the_card_says(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(saved("wan2.1"), tmp_path / "model"))
    built, loaded = Counter[str](), Counter[str]()
    build, read = VaeModel.__init__, VaeModel.load

    def count_build(self: VaeModel, *arguments: Any, **named: Any) -> None:
        built["model"] += 1
        build(self, *arguments, **named)

    def count_read(self: VaeModel, **named: Any) -> Any:
        loaded["weights"] += 1
        return read(self, **named)

    monkeypatch.setattr(VaeModel, "__init__", count_build)
    monkeypatch.setattr(VaeModel, "load", count_read)
    config = VideoEncoderConfig(kind="diffusers", model=str(folder), device="cpu", image_latents=True)
    assert load_video_encoder(config, image="apart").image == "apart"
    assert (built["model"], loaded["weights"]) == (1, 0)
    assert {load_video_encoder(config).image for _ in range(3)} == {"first_latent"}
    assert (built["model"], loaded["weights"]) == (1, 1)
    os.utime(folder / "diffusion_pytorch_model.safetensors", ns=(0, 0))
    assert load_video_encoder(config).image == "first_latent"
    assert (built["model"], loaded["weights"]) == (2, 2)


def test_pieces_of_time_that_no_setting_changes_are_a_hard_field(saved: Callable[[str], Path]) -> None:
    fields = load(saved("hunyuanvideo")).hard_fields()
    assert fields["time_tiles"] == {"tile_sample_min_num_frames": 16, "tile_sample_stride_num_frames": 12}
    assert all("time_tiles" not in load(saved(family)).hard_fields() for family in ("ltx", "wan2.1"))


def test_cosmos_is_scaled_by_its_scheduler_and_not_without(tmp_path: Path) -> None:
    folder = save_vae("cosmos", tmp_path / "vae")
    assert load(folder).scaling.factor == 0.5
    shutil.rmtree(tmp_path / "scheduler")
    with pytest.raises(ConfigError, match=r"scaled by sigma_data .* there is no .*scheduler_config\.json"):
        load(folder)


def test_a_gpu_that_is_not_there_is_one_sentence(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"video_encoder\.device = 'cuda': torch sees no GPU"):
        load(saved("wan2.1"), device="cuda").load()


TILED = {"cogvideox": (9, 48, 72), "wan2.1": (5, 32, 288), "ltx": (25, 64, 64), "image": (2, 32, 64)}
"""Clips that are larger than a tile: in width, or LTX's in time."""


@pytest.mark.parametrize("family", TILED)
def test_tiles_are_the_library_s_and_another_number(family: str, saved: Callable[[str], Path]) -> None:
    encoder, vae = load(saved(family)), library_vae(family, saved(family))
    clips = np.random.default_rng(1).integers(0, 256, (1, *TILED[family], 3), dtype=np.uint8)
    whole = encoder.encode(clips)["mean"][0]
    vae.enable_tiling()
    if family == "ltx":
        vae.use_framewise_encoding = vae.use_framewise_decoding = True
    want = library_moments(vae, clips, by_frame=family in BY_FRAME)[0]["mean"]
    assert torch.equal(encoder.encode(clips, tiled=True)["mean"][0], want)
    assert not torch.allclose(want, whole, atol=1e-3)
    assert torch.equal(encoder.encode(clips)["mean"][0], whole)
    sizes = encoder.tiling_fields()
    assert sizes
    assert all(getattr(vae, name) == value for name, value in sizes.items() if name != "temporal")


@pytest.mark.parametrize("family", ["allegro", "cosmos", "temporal_decoder"])
def test_an_encoder_that_knows_no_tiles_says_so(family: str, saved: Callable[[str], Path]) -> None:
    assert load(saved(family)).tiling_fields() == {}


PIECES = {"cogvideox": 9, "wan2.1": 4, "wan2.2": 4, "magvit": 4, "hunyuanvideo": 17, "qwenimage": 4}


@pytest.mark.parametrize("family", PIECES)
def test_a_long_clip_is_converted_piece_by_piece(family: str, saved: Callable[[str], Path]) -> None:
    """No piece is longer for a longer clip, so neither is what the model holds of it."""
    encoder, vae = load(saved(family)), library_vae(family, saved(family))
    encoder.load()
    lengths: list[int] = []
    encoder._vae.encoder.register_forward_pre_hook(  # type: ignore[attr-defined]
        lambda module, args: lengths.append(args[0].shape[2])
    )
    for frames in (25, 73):
        clip = np.random.default_rng(0).integers(0, 256, (1, frames, 32, 32, 3), dtype=np.uint8)
        want = library_moments(vae, clip, by_frame=False)[0]
        found = encoder.encode(clip)
        assert all(torch.equal(found[name][0], want[name]) for name in want)
        assert max(lengths) == PIECES[family]
        lengths.clear()


def test_hard_fields_are_of_the_content_and_not_of_the_place(
    tmp_path: Path, saved: Callable[[str], Path]
) -> None:
    fields = load(saved("cogvideox")).hard_fields()
    assert (fields["kind"], fields["class"]) == ("diffusers", "AutoencoderKLCogVideoX")
    assert fields["config"]["latent_channels"] == 4
    assert "act_fn" not in fields["config"]  # the default of the class
    assert fields["compute_dtype"] == "float32"
    (tmp_path / "pipeline").mkdir()
    save_vae("cogvideox", tmp_path / "pipeline" / "vae")
    assert load(tmp_path / "pipeline").hard_fields() == fields
    other = save_vae("cogvideox", tmp_path / "other", block_out_channels=(8, 8, 8, 16))
    differs = load(other).hard_fields()
    assert {name for name in fields if fields[name] != differs[name]} == {"config", "weights_sha256"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_model_runs_in_the_type_asked_for(dtype: str, saved: Callable[[str], Path]) -> None:
    encoder = load(saved("wan2.1"), compute_dtype=dtype)
    clip = draw("wan2.1")[:, :5, :32, :32]
    vae = library_vae("wan2.1", saved("wan2.1")).to(getattr(torch, dtype))
    with torch.no_grad():
        want = vae.encode(library_frames(clip).to(getattr(torch, dtype))).latent_dist
    found = encoder.encode(clip)
    assert found["mean"].dtype == torch.float32
    assert torch.equal(found["mean"][0], want.mean[0].transpose(0, 1).float())
    assert encoder.hard_fields()["compute_dtype"] == dtype


def test_channels_last_changes_rounding_alone(saved: Callable[[str], Path]) -> None:
    clip = draw("cogvideox")[:, :9]
    want = load(saved("cogvideox")).encode(clip)["mean"]
    torch.testing.assert_close(
        load(saved("cogvideox"), channels_last=True).encode(clip)["mean"], want, atol=1e-5, rtol=1e-4
    )


def test_a_batch_is_one_clip_unless_asked_or_on_a_gpu(saved: Callable[[str], Path]) -> None:
    assert load(saved("wan2.1")).batch_size((49, 480, 720)) == 1
    assert load(saved("wan2.1"), batch_size=3).batch_size((49, 480, 720)) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["cogvideox", "wan2.1", "wan2.2", "hunyuanvideo", "mochi", "image"])
def test_a_gpu_gives_the_library_s_numbers_without_making_the_host_wait(
    family: str, saved: Callable[[str], Path]
) -> None:
    encoder = load(saved(family), device="cuda", batch_size=2)
    vae = library_vae(family, saved(family)).to("cuda")
    shape = clip_shape(family)
    started = []
    clips = [draw(family, 2), draw(family, 2)[::-1]]
    for clip in clips:  # the second is begun before anyone waits for the first
        frames = encoder.buffer(2, shape)
        assert torch.from_numpy(frames).is_pinned()
        np.copyto(frames, clip)
        started.append(encoder.begin(frames))
    for wait, clip in zip(started, clips, strict=True):
        found = wait()
        assert found["mean"].device.type == "cpu"
        values = library_frames(clip).to("cuda")
        with torch.no_grad():
            if family == "image":
                want = torch.stack([vae.encode(each.transpose(0, 1)).latent_dist.mean for each in values])
            else:
                want = vae.encode(values).latent_dist.mean.transpose(1, 2)
        torch.testing.assert_close(found["mean"], want.cpu(), atol=2e-3, rtol=2e-3)
    assert encoder.batch_size((49, 480, 720)) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "tiled"), [("wan2.1", True), ("wan2.2", False), ("cogvideox", True)])
def test_on_a_gpu_the_host_does_not_wait_for_what_is_cut_up(
    family: str, tiled: bool, saved: Callable[[str], Path]
) -> None:
    encoder = load(saved(family), device="cuda")
    shape = (9, 64, 320)
    frames = encoder.buffer(1, shape)
    frames[...] = np.random.default_rng(0).integers(0, 256, frames.shape, dtype=np.uint8)
    want = load(saved(family)).encode(frames, tiled=tiled)["mean"]
    torch.testing.assert_close(encoder.encode(frames, tiled=tiled)["mean"], want, atol=2e-3, rtol=2e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        wait = encoder.begin(frames, tiled=tiled)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wait()


@pytest.mark.gpu
def test_memory_on_a_gpu_does_not_grow_with_the_clip(saved: Callable[[str], Path]) -> None:
    encoder = load(saved("cogvideox"), device="cuda")
    peaks = []
    for frames in (49, 49, 193):  # the first one pays for what libraries keep
        torch.cuda.reset_peak_memory_stats()
        encoder.encode(np.zeros((1, frames, 256, 256, 3), np.uint8))
        peaks.append(torch.cuda.max_memory_allocated())
    latents = 2 * 4 * 4 * 32 * 32 * 48 * 4
    assert peaks[2] < peaks[1] + 4 * latents


@pytest.mark.gpu
def test_a_compiled_encoder_gives_the_same_up_to_rounding(saved: Callable[[str], Path]) -> None:
    clip = draw("wan2.1")
    want = load(saved("wan2.1"), device="cuda").encode(clip)["mean"]
    found = load(saved("wan2.1"), device="cuda", compile=True).encode(clip)["mean"]
    torch.testing.assert_close(found, want, atol=2e-3, rtol=2e-3)
