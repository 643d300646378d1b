"""Bucket and token arithmetic: frame rules, latent shapes, the choice of a bucket.

F pixel frames, T latent frames, C latent channels, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from schemas.config import BucketConfig
from schemas.errors import ConfigError

PATCH = 2
"""Pixels of latent per transformer patch, in height and width (CogVideoX, Wan, HunyuanVideo)."""


@dataclass(frozen=True)
class Geometry:
    """What a video encoder does to a shape: F = temporal * (T - 1) + 1, H and W divided by `spatial`."""

    temporal: int
    spatial: int
    channels: int

    def latent_frames(self, num_frames: int) -> int:
        """T for F pixel frames; ValueError where the encoder cannot take F."""
        if (num_frames - 1) % self.temporal:
            raise ValueError(f"{num_frames = } is not {self.temporal}n + 1")
        return (num_frames - 1) // self.temporal + 1

    def pixel_frames(self, latent_frames: int) -> int:
        """F for T latent frames."""
        return (latent_frames - 1) * self.temporal + 1

    def latent_shape(self, bucket: BucketConfig) -> tuple[int, int, int, int]:
        """(T, C, H, W) of one clip's latents."""
        return (
            self.latent_frames(bucket.num_frames),
            self.channels,
            bucket.height // self.spatial,
            bucket.width // self.spatial,
        )


def bucket_name(bucket: BucketConfig) -> str:
    """Frames x height x width, as in `49x480x720`."""
    return f"{bucket.num_frames}x{bucket.height}x{bucket.width}"


def video_tokens(latent_shape: Sequence[int]) -> int:
    """Transformer tokens of latents (T, C, H, W) at a 2 x 2 patch."""
    frames, _, height, width = latent_shape
    return frames * (height // PATCH) * (width // PATCH)


def check_buckets(buckets: Sequence[BucketConfig], geometry: Geometry) -> None:
    """ConfigError naming the key and the nearest valid values where an encoder cannot take a bucket."""
    step = geometry.spatial * PATCH
    problems = []
    for i, bucket in enumerate(buckets):
        below = (bucket.num_frames - 1) // geometry.temporal * geometry.temporal + 1
        if below != bucket.num_frames:
            problems.append(
                f"buckets.{i}.num_frames = {bucket.num_frames}: the video encoder takes "
                f"{geometry.temporal}n + 1 frames; nearest are {below} and {below + geometry.temporal}"
            )
        for name, value in (("height", bucket.height), ("width", bucket.width)):
            floor = value // step * step
            if floor != value:
                near = f"{floor} and {floor + step}" if floor else f"{step}"
                problems.append(
                    f"buckets.{i}.{name} = {value}: expected a multiple of {step} pixels; nearest {near}"
                )
    if problems:
        raise ConfigError("; ".join(problems))


def choose_bucket(buckets: Sequence[BucketConfig], *, width: float, height: float, num_pictures: int) -> int:
    """Position of the bucket for a clip of `width` x `height` display pixels with `num_pictures`.

    The nearest aspect ratio wins (distance of logarithms, so 2:1 is as far from 1:1 as 1:2). Among
    equal ones: the most frames the clip can fill, else the fewest; then the largest picture that
    needs no enlarging, else the smallest; then the lower height. The order of `buckets` never matters.
    """
    aspect = math.log(width / height)

    def order(i: int) -> tuple[float, bool, int, bool, int, int, int]:
        bucket = buckets[i]
        distance = round(abs(math.log(bucket.width / bucket.height) - aspect), 9)
        fills = bucket.num_frames <= num_pictures
        area = bucket.width * bucket.height
        fits = area <= width * height
        return (
            distance,
            not fills,
            -bucket.num_frames if fills else bucket.num_frames,
            not fits,
            -area if fits else area,
            bucket.height,
            bucket.num_frames,
        )

    return min(range(len(buckets)), key=order)
