"""Bucket and token arithmetic: frame rules, latent shapes, the choice of a bucket.

F pixel frames, T latent frames, C latent channels, H, W pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from schemas.config import BucketConfig, FramesConfig, TargetConfig
from schemas.errors import ConfigError

PATCH = 2
"""Pixels of latent per transformer patch, in height and width (CogVideoX, Wan, HunyuanVideo)."""
_NO_TARGET = TargetConfig()
_LONGEST = 100_000
"""Frames to look ahead for a count that meets all rules."""
_WIDEST = 10_000
"""Pixels to look ahead for a side that meets all rules."""


@dataclass(frozen=True)
class Geometry:
    """What a video encoder does to a shape: H and W divided by `spatial`, and F by its frame rule."""

    temporal: int
    spatial: int
    channels: int
    causal: bool = True
    """Whether the first frame has a latent frame to itself: F = temporal * (T - 1) + 1; if not, it is
    temporal * T."""
    segment_frames: int = 0
    """Pixel frames of the independent pieces a clip is encoded in; 0: as a whole."""
    windows: tuple[tuple[int, int], ...] = ()
    """(length, step) in frames, height and width of windows that must cover a clip exactly (Allegro); empty
    where any size that divides will do."""

    def __post_init__(self) -> None:
        whole = dataclasses.replace(self, segment_frames=0) if self.segment_frames else self
        if self.segment_frames and not whole.takes(self.segment_frames):
            raise ValueError(f"segment_frames = {self.segment_frames}: expected {whole.rule} frames")

    @property
    def frame_step(self) -> int:
        """Valid frame counts are `frame_step` * n + `frame_rest`, from `frame_least` on."""
        if self.segment_frames:
            return self.segment_frames
        return self.windows[0][1] if self.windows else self.temporal

    @property
    def frame_rest(self) -> int:
        return self.frame_least % self.frame_step if self.frame_step > 1 else 0

    @property
    def frame_least(self) -> int:
        if self.windows and not self.segment_frames:
            return self.windows[0][0]
        return 1 if self.leading_frames else self.frame_step

    @property
    def leading_frames(self) -> int:
        """1 where a clip's first frame has a latent frame to itself; where each piece's has, none leads."""
        return int(self.causal and not self.segment_frames)

    @property
    def rule(self) -> str:
        """The frame counts the encoder takes, as in "4n + 1"."""
        if self.segment_frames:
            return f"a multiple of {self.segment_frames}"
        if self.windows:
            return f"{self.frame_step}n + {self.frame_least}"
        return f"{self.temporal}n + 1" if self.causal else f"{self.temporal}n"

    def takes(self, num_frames: int) -> bool:
        """Whether F pixel frames fit the rule."""
        return num_frames >= self.frame_least and (num_frames - self.frame_rest) % self.frame_step == 0

    def takes_side(self, axis: int, pixels: int) -> bool:
        """Whether a height (`axis` 0) or width (1) fits."""
        length, step = self.windows[axis + 1] if self.windows else (self.spatial, self.spatial)
        return pixels >= length and (pixels - length) % step == 0

    def latent_frames(self, num_frames: int) -> int:
        """T for F pixel frames; ValueError where the encoder cannot take F."""
        if not self.takes(num_frames):
            raise ValueError(f"{num_frames = } is not {self.rule}")
        piece = self.segment_frames or num_frames
        return num_frames // piece * ((piece - self.causal) // self.temporal + self.causal)

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
    most_latent_frames: int | None = None,
) -> None:
    """ConfigError naming the key and the nearest valid values where a bucket breaks a rule of the video
    encoder or of the model that will train on its latents.

    `text_length` is the tokens of one caption, `most_latent_frames` where the scaling rule ends. The nearest
    num_frames meet all other rules together, with the bucket's own height and width.
    """
    step = geometry.spatial * target.patch_size
    problems: list[str] = []
    rules = [_frame_rules(bucket, geometry, target) for bucket in buckets]
    for i, bucket in enumerate(buckets):
        for axis, (name, value) in enumerate((("height", bucket.height), ("width", bucket.width))):

            def fits(pixels: int, *, axis: int = axis) -> bool:
                return pixels % step == 0 and geometry.takes_side(axis, pixels)

            if not fits(value):
                below = next(filter(fits, range(value, 0, -1)), None)
                above = next(filter(fits, range(value, value + _WIDEST)), None)
                expected = f"a multiple of {step} pixels"
                if geometry.windows:
                    length, apart = geometry.windows[axis + 1]
                    expected += f" that is {apart}n + {length}"
                near = f"nearest {_one_or_other(below, above)}"
                if below is None and above is None:
                    near = f"there is none, target.patch_size = {target.patch_size} is too much for this VAE"
                problems.append(f"buckets.{i}.{name} = {value}: expected {expected}; {near}")
    settled = [
        (rule, bucket.num_frames)
        for rule, bucket in zip(rules, buckets, strict=True)
        if rule.cells is not None and next(rule.broken(bucket.num_frames, None), None) is None
    ]
    for i, (rule, bucket) in enumerate(zip(rules, buckets, strict=True)):
        broken = list(rule.broken(bucket.num_frames, text_length))
        if not broken:
            latent_frames = geometry.latent_frames(bucket.num_frames)
            if most_latent_frames is not None and latent_frames > most_latent_frames:
                problems.append(
                    f"buckets.{i}.num_frames = {bucket.num_frames}: {latent_frames} latent frames, and the "
                    f"model's scaling knows {most_latent_frames}"
                )
            continue
        problem = f"buckets.{i}.num_frames = {bucket.num_frames}: {' and '.join(broken)}; "
        problem += rule.nearest(bucket.num_frames, text_length)
        if (rule, bucket.num_frames) in settled:
            problem += _nearest_text_length(settled, text_length)
        problems.append(problem)
    if problems:
        raise ConfigError("; ".join(problems))


def own_lengths(buckets: Sequence[BucketConfig]) -> tuple[tuple[int, ...], ...]:
    """The `clip_lengths` of clips that all have their bucket's num_frames."""
    return tuple((bucket.num_frames,) for bucket in buckets)


def clip_lengths(
    buckets: Sequence[BucketConfig],
    geometry: Geometry,
    *,
    frames: FramesConfig,
    target: TargetConfig = _NO_TARGET,
    text_length: int = 0,
) -> tuple[tuple[int, ...], ...]:
    """Per bucket how many frames a clip of it may have, ascending.

    That is the bucket's num_frames, and under `frames.clips = "whole"` every count up to it that meets the
    rules of `check_buckets`. A single frame is no clip, so it counts only where it is all the bucket has.
    """
    if frames.clips != "whole":
        return own_lengths(buckets)
    lengths = []
    for bucket in buckets:
        rule = _frame_rules(bucket, geometry, target)
        shorter = range(2, bucket.num_frames)
        valid = (n for n in shorter if next(rule.broken(n, text_length), None) is None)
        lengths.append((*valid, bucket.num_frames))
    return tuple(lengths)


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
        if not self.geometry.takes(num_frames):
            yield f"the video encoder takes {self.geometry.rule} frames"
        if more % target.frame_multiple:
            multiple = target.frame_multiple
            yield f"target.frame_multiple = {multiple} asks for {multiple}n + 1 frames"
        if target.segment_frames and more > target.segment_frames and more % target.segment_frames:
            yield (
                f"target.segment_frames = {target.segment_frames} asks for whole segments, "
                f"{target.segment_frames}n + 1 frames"
            )
        if not self.geometry.takes(num_frames):
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
        step, rest = self.geometry.frame_step, self.geometry.frame_rest
        first = (num_frames - rest) // step * step + rest

        def valid(candidate: int) -> bool:
            return candidate != num_frames and next(self.broken(candidate, text_length), None) is None

        below = next(filter(valid, range(first, 0, -step)), None)
        above = next(filter(valid, range(first + step, first + _LONGEST, step)), None)
        if below is None and above is None:
            return f"no num_frames up to {first + _LONGEST} meets all rules together: change one of them"
        return f"nearest {'is' if None in (below, above) else 'are'} {_one_or_other(below, above)}"


def _frame_rules(bucket: BucketConfig, geometry: Geometry, target: TargetConfig) -> _FrameRules:
    step = geometry.spatial * target.patch_size
    fits = bucket.height % step == 0 and bucket.width % step == 0
    return _FrameRules(geometry, target, (bucket.height // step) * (bucket.width // step) if fits else None)


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


def choose_bucket(
    buckets: Sequence[BucketConfig], *, width: float, height: float, num_pictures: int, whole: bool = False
) -> int:
    """Position of the bucket for a clip of `width` x `height` display pixels with `num_pictures`.

    The nearest aspect ratio wins (distance of logarithms, so 2:1 is as far from 1:1 as 1:2). Among
    equal ones: the most frames the clip can fill, else the fewest (`whole`: the fewest that hold all of the
    clip, else the most); then the largest picture that needs no enlarging, else the smallest; then the
    lower height. The order of `buckets` never matters.
    """
    aspect = math.log(width / height)

    def order(i: int) -> tuple[float, bool, int, bool, int, int, int]:
        bucket = buckets[i]
        distance = round(abs(math.log(bucket.width / bucket.height) - aspect), 9)
        fits_time = bucket.num_frames >= num_pictures if whole else bucket.num_frames <= num_pictures
        area = bucket.width * bucket.height
        fits = area <= width * height
        return (
            distance,
            not fits_time,
            -bucket.num_frames if fits_time != whole else bucket.num_frames,
            not fits,
            -area if fits else area,
            bucket.height,
            bucket.num_frames,
        )

    return min(range(len(buckets)), key=order)
