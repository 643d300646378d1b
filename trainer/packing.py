"""Packing: clip lengths in, lists of clips that share one token budget out; then the packs themselves.

Arithmetic first (`plan_packs` knows lengths only), tensors second (`Segment`, `Pack`). Best fit with
a bounded number of open bins reads its input once and in order; where the budget is twice the
longest clip it fills 99.0-99.5 % of it (3,000 and 20,000 clips; curriculum, log-normal and uniform
lengths). Sorting everything first gains at most 0.6 % more, but needs the whole epoch in memory and
puts clips of one length together.

T latent frames, C channels, H, W latent pixels, S prompt tokens, D prompt width.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

OPEN_BINS = 64
"""More (256) gains nothing measurable where the budget is twice the longest clip."""


class _Bin(NamedTuple):
    """Sorts by room left, so that the tightest fit is one bisection away; `first` breaks ties."""

    room: int
    first: int
    items: list[tuple[int, int]]
    """(length, position) of each member."""

    @property
    def positions(self) -> list[int]:
        return [position for _, position in self.items]


def _put(bins: list[_Bin], item: tuple[int, int], capacity: int) -> None:
    """Put one item into the tightest of the sorted `bins`, or into a new one."""
    length, position = item
    fit = bisect_left(bins, _Bin(length, -1, []))
    bin_ = bins.pop(fit) if fit < len(bins) else _Bin(capacity, position, [])
    bin_.items.append(item)
    insort(bins, bin_._replace(room=bin_.room - length))


def iter_packs(lengths: Iterable[int], *, capacity: int, open_bins: int = OPEN_BINS) -> Iterator[list[int]]:
    """Yield lists of positions in `lengths`, each of at most `capacity` in sum, as they fill up."""
    bins: list[_Bin] = []
    for position, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"expected lengths in 1..{capacity}, found {length = } at {position = }")
        _put(bins, (length, position), capacity)
        if bins[0].room == 0 or len(bins) > open_bins:
            yield bins.pop(0).positions
    # What is still open is packed again, longest first: that saves a pack or two at the end of an
    # epoch, which is several percent of a dataset of a few dozen clips.
    again: list[_Bin] = []
    for item in sorted((item for bin_ in bins for item in bin_.items), reverse=True):
        _put(again, item, capacity)
    for bin_ in min(bins, again, key=len):
        yield bin_.positions


def plan_packs(lengths: Iterable[int], *, capacity: int, open_bins: int = OPEN_BINS) -> list[list[int]]:
    """Every position of `lengths` in exactly one pack; pure, so every rank plans the same."""
    return list(iter_packs(lengths, capacity=capacity, open_bins=open_bins))


@dataclass(frozen=True, eq=False, repr=False)
class Segment:
    """One clip, or its window, as the model sees it: one attention span of a pack."""

    sample_id: str
    key: str
    """Names this visit (seed, stage, epoch, sample); noise and timestep are drawn from
    `keyed_generator(segment.key, "noise")` and so on. Differs between two visits of one sample."""
    latents: torch.Tensor
    """[T, C, H, W] float32, clean, scaled for the model."""
    prompt_embeds: torch.Tensor
    """[S, D] float32."""
    image_latents: torch.Tensor | None = None
    """[1, C, H, W] float32, the first frame's condition as the model sees it; None where it takes none."""
    frame_weights: torch.Tensor | None = None
    """[T] float32, weight of each latent frame's error; None: all 1."""
    weight: float = 1.0
    """0: the sample could not be read; its latents are zeros and it adds nothing to the loss."""
    seconds: float = 0.0
    """Source seconds of the window."""

    def __post_init__(self) -> None:
        for name, rank in (("latents", 4), ("prompt_embeds", 2), ("image_latents", 4), ("frame_weights", 1)):
            tensor = getattr(self, name)
            if tensor is None and name in ("image_latents", "frame_weights"):
                continue
            if tensor.ndim != rank or tensor.dtype != torch.float32 or 0 in tensor.shape:
                raise ValueError(
                    f"{name} of {self.sample_id}: expected {rank} non-empty dimensions of float32, "
                    f"found {tensor.dtype} {tuple(tensor.shape)}"
                )
        image, weights = self.image_latents, self.frame_weights
        if image is not None and image.shape != (1, *self.latents.shape[1:]):
            raise ValueError(
                f"image_latents of {self.sample_id}: expected {(1, *self.latents.shape[1:])} as one of its "
                f"latent frames, found {tuple(image.shape)}"
            )
        if weights is not None and len(weights) != len(self.latents):
            raise ValueError(
                f"frame_weights of {self.sample_id}: expected one for each of its {len(self.latents)} latent "
                f"frames, found {len(weights)}"
            )

    def __repr__(self) -> str:
        latents, prompt = tuple(self.latents.shape), tuple(self.prompt_embeds.shape)
        return f"Segment({self.sample_id}, latents={latents}, prompt_embeds={prompt})"


@dataclass(frozen=True, eq=False, repr=False)
class Pack:
    """Clips of any shapes that run through the model as one token stream."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        channels = {segment.latents.shape[1] for segment in self.segments}
        widths = {segment.prompt_embeds.shape[1] for segment in self.segments}
        if len(channels) != 1 or len(widths) != 1:
            raise ValueError(
                "expected segments of one channel count and one prompt width, "
                f"found {channels = }, {widths = } in {len(self.segments)} segments"
            )

    def __repr__(self) -> str:
        return f"Pack({', '.join(map(repr, self.segments))})"


@dataclass(frozen=True)
class StepWeights:
    """Sizes of one step over all ranks, known from the plan: what a loss is divided by."""

    num_clips: int
    num_video_tokens: float
    """Each token counted by the weight of its latent frame's error (`Segment.frame_weights`)."""
    num_tokens: int
    """Of the stream: video, and prompts where they are part of it."""
