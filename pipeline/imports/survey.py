"""Every file of a cache, looked at before anything is written: what its latents and prompts are.

In: a reader and what the VAE does to a shape. Out: one answer for the whole cache, or a refusal that names
the first file that disagrees with those before it. Torn files are left to their unit, which quarantines their
row. Only headers are read.

T latent frames, C latent channels, K stored channels, H, W latent cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from pipeline.imports.cache import Cache, CachedClip, CachedLatents, refused
from pipeline.imports.files import CacheFile, dtype_name
from schemas.bucket import Geometry
from schemas.config import BucketConfig, Dtype
from schemas.errors import ClipError, ConfigError
from schemas.scaling import Scaling

_NEAR = 0.02
"""Relative difference of a VAE's statistics that rounding to bfloat16 explains."""
_Look = TypeVar("_Look")


@dataclass(frozen=True)
class LatentsFacts:
    """What all latents of a cache have in common."""

    store: Literal["moments", "mean", "sample"]
    dtype: Dtype
    geometry: Geometry
    """Of the VAE, with the frame rule that the clips follow."""
    buckets: tuple[BucketConfig, ...]


@dataclass(frozen=True)
class PromptFacts:
    """What all prompts of a cache have in common."""

    dtype: Dtype
    width: int
    masked: bool
    length: int | None
    """Rows of one segment; None where pad rows were cut off."""


Reading = Callable[[Path], CacheFile]


def survey_latents(
    cache: Cache, clips: list[CachedClip], *, read: Reading, geometry: Geometry, scaling: Scaling
) -> LatentsFacts:
    """ConfigError for a file that breaks the VAE's geometry, is of another VAE or unlike the others, or where
    none can be read."""
    common = _Common()
    buckets = set()
    for clip, latents in _looked_at(clips, lambda clip: cache.latents(read(clip.path)), what="latents"):
        bucket, rule = placed(clip, latents, geometry)
        single = latents.values.shape[1] == geometry.channels
        common.take(clip.path, "latents", cache.single if single else "moments")
        common.take(clip.path, "type", dtype_name(latents.values))
        common.take(clip.path, "frame rule", rule)
        if latents.stated:
            _require_same_vae(clip.path, latents.stated, scaling)
        buckets.add(bucket)
    found = common.values
    return LatentsFacts(
        store=found["latents"],
        # What was scaled is unscaled in float32 and kept so: scaled again it is, rounded, what it was.
        dtype="float32" if cache.scaled else found["type"],
        geometry=found["frame rule"],
        buckets=tuple(sorted(buckets, key=lambda bucket: (bucket.num_frames, bucket.height, bucket.width))),
    )


def survey_prompts(cache: Cache, clips: list[CachedClip], *, read: Reading) -> PromptFacts:
    """ConfigError for a file unlike the others, or where none can be read."""
    common = _Common()
    for clip, prompt in _looked_at(
        clips, lambda clip: cache.prompt([read(path) for path in clip.prompt]), what="prompts"
    ):
        path = clip.prompt[0]
        common.take(path, "type", dtype_name(prompt.embeds))
        common.take(path, "width", prompt.embeds.shape[1])
        common.take(path, "mask", prompt.mask is not None)
        for length in prompt.segments:
            common.take(path, "length", length if cache.padding == "full" else None)
    found = common.values
    return PromptFacts(found["type"], found["width"], found["mask"], found["length"])


def placed(clip: CachedClip, latents: CachedLatents, geometry: Geometry) -> tuple[BucketConfig, Geometry]:
    """Shape of the clip in pixels, and the frame rule it follows; ConfigError where no rule of the VAE fits.

    CogVideoX's gives 12 latent frames for 45 frames and, as no chunk then has a first frame of its own, for
    48: where the cache says how many there were, that decides.
    """
    frames, channels, height, width = latents.values.shape
    if channels not in (geometry.channels, 2 * geometry.channels):
        c = geometry.channels
        what = f"latents of shape {[frames, channels, height, width]} (T, C, H, W)"
        raise refused(clip.path, what, f"expected {c} channels, or {2 * c} of moments: give the VAE it is of")
    rules = [dataclasses.replace(geometry, causal=causal, segment_frames=0) for causal in (True, False)]
    counts = {rule: rule.temporal * (frames - rule.causal) + rule.causal for rule in rules}
    if not clip.num_frames:
        counts = {rule: count for rule, count in counts.items() if rule.causal == geometry.causal}
    fitting = [
        (rule, count) for rule, count in counts.items() if not clip.num_frames or count in clip.num_frames
    ]
    if not fitting:
        said = " or ".join(map(str, clip.num_frames))
        what = f"{frames} latent frames of {said} frames"
        raise refused(
            clip.path, what, f"this VAE makes one of {geometry.temporal} frames: give the VAE it is of"
        )
    rule, count = fitting[0]
    pixels = (height * geometry.spatial, width * geometry.spatial)
    if clip.pixels and clip.pixels != pixels:
        what = f"{height} x {width} latent cells of {clip.pixels[0]} x {clip.pixels[1]} pixels"
        raise refused(clip.path, what, f"this VAE divides by {geometry.spatial}: give the VAE it is of")
    return BucketConfig(num_frames=count, height=pixels[0], width=pixels[1]), rule


class _Common:
    """What the first file said; every other must say the same."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._first: dict[str, Path] = {}

    def take(self, path: Path, name: str, value: Any) -> None:
        first = self._first.setdefault(name, path)
        if self.values.setdefault(name, value) != value:
            what = f"{name} {_word(value)}, but {_word(self.values[name])} in {first}"
            raise refused(
                path, what, "a dataset holds one kind: import them one by one, from folders of their own"
            )


def _word(value: Any) -> str:
    return f"{value.rule} frames" if isinstance(value, Geometry) else str(value)


def _looked_at(
    clips: list[CachedClip], look: Callable[[CachedClip], _Look], *, what: str
) -> Iterator[tuple[CachedClip, _Look]]:
    """Every clip whose file is sound; ConfigError where none is."""
    torn, sound = None, False
    for clip in clips:
        try:
            found = look(clip)
        except ClipError as error:
            torn = torn or error
            continue
        sound = True
        yield clip, found
    if not sound:
        raise ConfigError(f"not one file of {what} can be read: {torn.message if torn else 'there is none'}")


def _require_same_vae(path: Path, stated: tuple[list[float], list[float]], scaling: Scaling) -> None:
    mean, std = (np.array(values) for values in stated)
    ours = (np.array(scaling.mean), np.array(scaling.std))
    same = ours[0].shape == mean.shape and all(
        np.allclose(a, b, rtol=_NEAR, atol=_NEAR * float(ours[1].max()))
        for a, b in zip((mean, std), ours, strict=True)
    )
    if not same:
        what = f"was made with a VAE of mean {_few(mean)} and deviation {_few(std)} by channel"
        raise refused(
            path, what, f"the one given has {_few(ours[0])} and {_few(ours[1])}: give the VAE it is of"
        )


def _few(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:3])
    return f"[{shown}{', ...' if len(values) > 3 else ''}]"
