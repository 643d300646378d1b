"""Bucket and token arithmetic: frame rules, latent shapes, the choice of a bucket.

F pixel frames, T latent frames, C latent channels, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from schemas.config import BucketConfig, TargetConfig
from schemas.errors import ConfigError

PATCH = 2
"""Pixels of latent per transformer patch, in height and width (CogVideoX, Wan, HunyuanVideo)."""
_NO_TARGET = TargetConfig()
_LONGEST = 100_000
"""Frames to look ahead for a count that meets all rules."""


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


def check_buckets(
    buckets: Sequence[BucketConfig],
    geometry: Geometry,
    *,
    target: TargetConfig = _NO_TARGET,
    text_length: int = 0,
) -> None:
    """ConfigError naming the key and the nearest valid values where a bucket breaks a rule of the video
    encoder or of the model that will train on its latents.

    `text_length` is the tokens of one caption. The nearest num_frames meet all rules together, with the
    bucket's own height and width.
    """
    step = geometry.spatial * PATCH
    problems: list[str] = []
    rules = []
    for i, bucket in enumerate(buckets):
        sides = (("height", bucket.height), ("width", bucket.width))
        for name, value in sides:
            if value % step:
                near = _one_or_other(value // step * step, value // step * step + step)
                problems.append(
                    f"buckets.{i}.{name} = {value}: expected a multiple of {step} pixels; nearest {near}"
                )
        fits = all(value % step == 0 for _, value in sides)
        cells = (bucket.height // step) * (bucket.width // step) if fits else None
        rules.append(_FrameRules(geometry, target, cells))
    settled = [
        (rule, bucket.num_frames)
        for rule, bucket in zip(rules, buckets, strict=True)
        if rule.cells is not None and next(rule.broken(bucket.num_frames, None), None) is None
    ]
    for i, (rule, bucket) in enumerate(zip(rules, buckets, strict=True)):
        broken = list(rule.broken(bucket.num_frames, text_length))
        if not broken:
            continue
        problem = f"buckets.{i}.num_frames = {bucket.num_frames}: {' and '.join(broken)}; "
        problem += rule.nearest(bucket.num_frames, text_length)
        if (rule, bucket.num_frames) in settled:
            problem += _nearest_text_length(settled, text_length)
        problems.append(problem)
    if problems:
        raise ConfigError("; ".join(problems))


@dataclass(frozen=True)
class _FrameRules:
    """What num_frames of one bucket must meet."""

    geometry: Geometry
    target: TargetConfig
    cells: int | None
    """Transformer patches of one latent frame; None where the bucket's sides do not divide."""

    def broken(self, num_frames: int, text_length: int | None) -> Iterator[str]:
        """A sentence per rule that `num_frames` breaks; without a text length, but the token rule."""
        target, more = self.target, num_frames - 1
        if more % self.geometry.temporal:
            yield f"the video encoder takes {self.geometry.temporal}n + 1 frames"
        if more % target.frame_multiple:
            multiple = target.frame_multiple
            yield f"target.frame_multiple = {multiple} asks for {multiple}n + 1 frames"
        if target.segment_frames and more > target.segment_frames and more % target.segment_frames:
            yield (
                f"target.segment_frames = {target.segment_frames} asks for whole segments, "
                f"{target.segment_frames}n + 1 frames"
            )
        if more % self.geometry.temporal:
            return
        latent_frames = self.geometry.latent_frames(num_frames)
        if latent_frames % target.patch_size_t:
            yield (
                f"target.patch_size_t = {target.patch_size_t} asks for latent frames in multiples of "
                f"{target.patch_size_t}, found {latent_frames}"
            )
        elif text_length is not None and self.cells is not None:
            segments = max(1, more // target.segment_frames) if target.segment_frames else 1
            video = latent_frames // target.patch_size_t * self.cells
            tokens = video + segments * text_length
            if tokens % target.token_multiple:
                yield (
                    f"target.token_multiple = {target.token_multiple} asks for tokens in multiples of "
                    f"{target.token_multiple}, found {tokens} "
                    f"({video} of video, {segments} x {text_length} of text)"
                )

    def nearest(self, num_frames: int, text_length: int) -> str:
        """The valid counts around `num_frames`, in words."""
        step = math.lcm(self.geometry.temporal, self.target.frame_multiple)
        first = (num_frames - 1) // step * step + 1

        def valid(candidate: int) -> bool:
            return candidate != num_frames and next(self.broken(candidate, text_length), None) is None

        below = next(filter(valid, range(first, 0, -step)), None)
        above = next(filter(valid, range(first + step, first + _LONGEST, step)), None)
        if below is None and above is None:
            return f"no num_frames up to {first + _LONGEST} meets all rules together: change one of them"
        return f"nearest {'is' if None in (below, above) else 'are'} {_one_or_other(below, above)}"


def _nearest_text_length(settled: Sequence[tuple[_FrameRules, int]], text_length: int) -> str:
    """The caption lengths around `text_length` at which all settled buckets meet the token rule, in words."""

    def valid(length: int) -> bool:
        return all(next(rule.broken(num_frames, length), None) is None for rule, num_frames in settled)

    period = settled[0][0].target.token_multiple
    below = next(filter(valid, range(text_length - 1, max(0, text_length - 1 - period), -1)), None)
    above = next(filter(valid, range(text_length + 1, text_length + 1 + period)), None)
    if below is None and above is None:
        return ", and no text_encoder.max_length would do"
    return f", or text_encoder.max_length = {_one_or_other(below, above, joined='or')}"


def _one_or_other(below: int | None, above: int | None, *, joined: str = "and") -> str:
    return f" {joined} ".join(str(value) for value in (below, above) if value)


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
