"""The `dct` codec: what its numbers are, that they are exact, causal and the same everywhere."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import dct
from pipeline.decode import decode_clip
from schemas.config import BucketConfig, FramesConfig, LimitsConfig, ResizeConfig
from schemas.scaling import scale


def noise(num_frames: int, height: int, width: int) -> np.ndarray:
    """Frames [F, H, W, 3] of bytes that are the same on every platform."""
    size = num_frames * height * width * 3
    return np.frombuffer(hashlib.shake_256(b"noise").digest(size), np.uint8).reshape(
        num_frames, height, width, 3
    )


def waves(num_frames: int, height: int, width: int) -> np.ndarray:
    """A smooth coloured pattern that drifts."""
    t, y, x = np.meshgrid(
        *(np.arange(n, dtype=np.float64) for n in (num_frames, height, width)), indexing="ij"
    )
    planes = [np.sin(x / 19 + t / 9), np.sin(y / 23 - t / 11 + 1), np.sin((x + y) / 31 + 2)]
    return (127.5 + 110 * np.stack(planes, -1)).round().astype(np.uint8)


def orthonormal(size: int) -> np.ndarray:
    matrix = np.array(
        [[np.cos(np.pi * (2 * i + 1) * k / (2 * size)) for i in range(size)] for k in range(size)]
    )
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def full_transform(group: np.ndarray) -> np.ndarray:
    """[4, H, W, 3] -> every coefficient [plane, time, row, column, H/8, W/8]."""
    r, g, b = np.moveaxis(group / 127.5 - 1, -1, 0)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    planes = np.stack([luma, (b - luma) / 1.772, (r - luma) / 1.402])
    _, frames, height, width = planes.shape
    blocks = planes.reshape(3, frames, height // 8, 8, width // 8, 8)
    return np.einsum("at,bi,cj,pthiwj->pabchw", orthonormal(4), orthonormal(8), orthonormal(8), blocks)


def test_channels_are_the_coefficients_the_table_names() -> None:
    frames = noise(9, 16, 24)
    latents = dct.encode_frames(frames)
    assert latents.shape == (3, 16, 2, 3)
    assert latents.dtype == np.float32
    groups = [np.repeat(frames[:1], 4, axis=0), frames[1:5], frames[5:9]]
    for latent, group, first in zip(latents, groups, (True, False, False), strict=True):
        every = full_transform(group)
        for got, channel in zip(latent, dct.TABLE, strict=True):
            plane, time, row, column = channel.first if first else channel.group
            want = every[["Y", "Cb", "Cr"].index(plane), time, row, column]
            np.testing.assert_allclose(got, want, atol=2e-3)


def test_a_channel_of_stills_means_the_same_at_every_time() -> None:
    still = np.repeat(noise(1, 16, 16), 5, axis=0)
    first, group = dct.encode_frames(still)
    shared = [i for i, channel in enumerate(dct.TABLE) if channel.first == channel.group]
    moving = [i for i, channel in enumerate(dct.TABLE) if channel.group[1] > 0]
    assert sorted(shared + moving) == list(range(16))
    np.testing.assert_allclose(group[shared], first[shared], atol=2e-3)
    np.testing.assert_allclose(group[moving], 0, atol=2e-3)


def test_gray_is_luma_alone() -> None:
    latents = dct.encode_frames(np.full((5, 8, 8, 3), 200, np.uint8))[..., 0, 0]
    np.testing.assert_allclose(latents[:, 0], 16 * (200 / 127.5 - 1), atol=2e-3)
    np.testing.assert_allclose(latents[:, 1:], 0, atol=1e-5)


@pytest.mark.parametrize(
    "pixels", [noise(5, 8, 16), np.full((5, 8, 16, 3), 255, np.uint8)], ids=["noise", "white"]
)
def test_products_are_whole_numbers(pixels: np.ndarray) -> None:
    latents = dct.encode_frames(pixels)
    for transform, group, got in (
        (dct._FIRST, pixels[:1], latents[0]),
        (dct._GROUP, pixels[1:], latents[1]),
    ):
        vertical, horizontal = transform.vertical.astype(np.int64), transform.horizontal.astype(np.int64)
        assert 255 * np.abs(vertical).sum(1).max() < 2**24
        assert 255 * np.abs(vertical).sum(1).max() * np.abs(horizontal).sum(1).max() < 2**53
        blocks = group.astype(np.int64).reshape(len(group) * 8, 2, 24)
        whole = np.einsum("cv,vwh,ch->cw", vertical[transform.pairs], blocks, horizontal)
        ones = vertical[transform.pairs].sum(1) * horizontal.sum(1) / 2.0**37
        want = (whole / (2.0**37 * 127.5) - ones[:, None]).astype(np.float32)
        np.testing.assert_array_equal(got[:, 0], want)


def test_prefix_of_the_frames_gives_the_prefix_of_the_latents() -> None:
    frames = noise(13, 72, 40)
    whole = dct.encode_frames(frames)
    for num_frames in (1, 5, 9):
        prefix = dct.encode_frames(frames[:num_frames])
        np.testing.assert_array_equal(prefix, whole[: len(prefix)])


def test_layout_of_the_input_changes_nothing() -> None:
    frames = noise(5, 72, 40)
    scattered = np.asfortranarray(frames)
    assert not scattered.flags.c_contiguous
    np.testing.assert_array_equal(dct.encode_frames(scattered), dct.encode_frames(frames))


def test_same_bits_in_every_process_with_every_thread_count() -> None:
    program = (
        "import hashlib; from tests.pipeline.test_dct import noise; from pipeline import dct; "
        "print(hashlib.sha256(dct.encode_frames(noise(5, 480, 720)).tobytes()).hexdigest())"
    )
    root = Path(__file__).resolve().parents[2]
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env={
                **os.environ,
                "OPENBLAS_NUM_THREADS": threads,
                "OMP_NUM_THREADS": threads,
                "PYTHONPATH": str(root),
            },
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for threads in ("1", "2")
    }
    digests.add(hashlib.sha256(dct.encode_frames(noise(5, 480, 720)).tobytes()).hexdigest())
    assert len(digests) == 1


def test_the_numbers_and_their_digest_change_together() -> None:
    """Both belong to datasets on disk: a new table needs a new digest, which makes them stale."""
    assert dct.table_digest() == "cf8206a1f60ef47f3a0143a6d6dbb753dbbefac1b2468d622f7f66f510cac0fe"
    latents = dct.encode_frames(noise(5, 16, 16))
    assert (
        hashlib.sha256(latents.astype("<f4").tobytes()).hexdigest()
        == "ebde5fa4a90e1185da4b24a7bd043d1fd26011e1a5e221e431fcd48ce0a3e930"
    )


def test_decoding_gives_the_picture_back() -> None:
    frames = waves(9, 64, 96)
    decoded = dct.decode_latents(dct.encode_frames(frames))
    assert decoded.shape == frames.shape
    assert decoded.dtype == np.uint8
    error = (decoded.astype(np.float64) - frames) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 30
    assert 10 * np.log10(255**2 / error[0].mean()) > 32


def test_decoded_latents_encode_to_themselves() -> None:
    latents = dct.encode_frames(waves(9, 64, 96))
    again = dct.encode_frames(dct.decode_latents(latents))
    np.testing.assert_allclose(again, latents, atol=0.15)  # 8-bit pixels between the two


def test_real_clips_look_like_themselves_and_scale_to_unit_variance(clips_dir: Path) -> None:
    """A few cheap ones of very different content; each channel's spread is that of the whole collection."""
    names = ["carphone_pristine.mp4", "nasa_13013.mp4", "bikes.mp4", "friday.mp4", "video_desks.3gp"]
    scaled = []
    for name in names:
        frames, _, _ = decode_clip(
            clips_dir / name,
            frames=FramesConfig(),
            buckets=(BucketConfig(num_frames=49, height=192, width=288),),
            resize=ResizeConfig(),
            limits=LimitsConfig(),
        )
        latents = dct.encode_frames(frames)
        error = (dct.decode_latents(latents).astype(np.float32) - frames) ** 2
        assert 10 * np.log10(255**2 / error.mean()) > 24, name
        scaled.append(scale(latents, dct.SCALING))
    pooled = np.concatenate(scaled)
    assert np.abs(pooled.mean((0, 2, 3))).max() < 0.5
    spread = pooled.std((0, 2, 3))
    assert 0.4 < spread.min() < spread.max() < 1.6


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((5, 8, 8, 3), np.float32, "uint8"),
        ((5, 8, 8, 4), np.uint8, "uint8 frames"),
        ((5, 8, 12, 3), np.uint8, "multiples of 8"),
        ((6, 8, 8, 3), np.uint8, "not 4n"),
    ],
)
def test_frames_it_cannot_take_are_refused(shape: tuple[int, ...], dtype: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dct.encode_frames(np.zeros(shape, dtype))


def test_latents_of_another_encoder_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[T, 16, H/8, W/8\]"):
        dct.decode_latents(np.zeros((2, 4, 8, 8), np.float32))
