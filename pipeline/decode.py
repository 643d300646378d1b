"""A video file -> the frames of one sample: decode as few pictures as possible, verify, then fall back.

In: a path, a time window and the settings. Out: uint8 frames [F, H, W, 3], the bucket they fit, and a
record of where they come from. Pictures are chosen on the packets' timestamps and decoded by plan.
Where that is not provably what a plain decode gives (a picture missing or flagged, an error, times out
of order), the clip is decoded again in order. What that cannot decode either falls under two rules:

- A packet that silently gives no picture (hidden frames, leading pictures of a cut stream) is no picture
  of the clip; the choice is made again without it.
- A picture is damaged if its packet raises an error, or if the decoder flags it, and so is everything
  after it up to the next clean key frame, as it may refer to it. A damaged picture is replaced by its
  nearest intact neighbour in time and recorded as repaired. A clip with more than `limits.max_damage`
  of its wanted pictures damaged is refused: ClipError `damaged`.

F frames, H, W pixels of the bucket.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from pipeline.clip import ClipRecord
from pipeline.container import open_video
from pipeline.frames import (
    ONE,
    Choice,
    choose_frames,
    frame_weights,
    hard_cuts,
    num_available,
    unblended_at,
)
from pipeline.geometry import display_size, orientation_of
from pipeline.normalize import Normalizer, color_of
from pipeline.packets import read_packets
from pipeline.pictures import PictureDecoder
from pipeline.probe import first_picture
from pipeline.timeline import Timeline
from schemas.bucket import choose_bucket
from schemas.config import BucketConfig, FramesConfig, LimitsConfig, ResizeConfig
from schemas.errors import ClipError

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def decode_clip(
    path: str | Path,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    frames: FramesConfig,
    buckets: Sequence[BucketConfig],
    resize: ResizeConfig,
    limits: LimitsConfig,
    buffer: np.ndarray | None = None,
) -> tuple[np.ndarray, int, ClipRecord]:
    """Frames [F, H, W, 3] of the clip, the position of their bucket, and their record.

    `buffer`, flat uint8 large enough for any bucket, takes the frames if given; the result is then a view
    of it. ClipError where the file or the window cannot become a sample.
    """
    with open_video(path, limits=limits) as video:
        packets = read_packets(video, limits=limits)
        first = first_picture(video, packets, limits=limits)
        color, orientation = color_of(first), orientation_of(first)
        shown = display_size(first.width, first.height, sar=video.sar, orientation=orientation)

        def take(timeline: Timeline, intact: Collection[int] | None = None) -> tuple[_Take, Normalizer]:
            timeline = timeline.window(start_s, end_s)
            available = num_available(timeline.duration_s, len(timeline.pts), frames=frames)
            position = choose_bucket(buckets, width=shown[0], height=shown[1], num_pictures=available)
            bucket = buckets[position]
            choice = choose_frames(timeline, num_frames=bucket.num_frames, frames=frames)
            taken = _Take(
                timeline,
                choice,
                position=position,
                intact=intact,
                bucket=bucket,
                limits=limits,
                buffer=buffer,
            )
            return taken, Normalizer(bucket, resize=resize, sar=video.sar)

        notes = [packets.damage] if packets.damage else []
        decoder = PictureDecoder(video, packets, limits=limits)
        taken, normalizer = take(packets.timeline)
        outcome = decoder.planned(taken.homes, normalizer)
        if outcome.doubt:
            notes.append(f"decoded in order: {outcome.doubt}")
            outcome = decoder.in_order(taken.homes, normalizer)
            if not outcome.intact.issuperset(taken.homes):
                hidden = set(packets.timeline.pts) - outcome.intact - outcome.damaged - outcome.failed
                if hidden:
                    notes.append(f"{len(hidden)} of {len(packets.timeline.pts)} packets show no picture")
                taken, normalizer = take(packets.timeline.without(hidden), outcome.intact)
                outcome = decoder.in_order(taken.homes, normalizer)
                if not outcome.intact.issuperset(taken.homes):
                    raise ClipError("damaged", f"its pictures do not decode twice alike: {outcome.doubt}")
        result = taken.finish()
        record = ClipRecord(
            codec=video.codec,
            container=video.container_name,
            source_width=first.width,
            source_height=first.height,
            rotation=orientation.rotation,
            sar=f"{video.sar.numerator}:{video.sar.denominator}",
            source_fps=taken.timeline.fps,
            duration_s=taken.timeline.duration_s,
            num_pictures=len(taken.timeline.pts),
            pts_s=[round(taken.timeline.seconds(tick), 6) for tick in taken.choice.ticks],
            coverage=taken.choice.coverage,
            effective_fps=taken.effective_fps,
            interpolated=taken.choice.interpolated,
            duplicated=taken.choice.duplicated,
            repaired=taken.repaired,
            frame_weights=frame_weights(taken.choice, taken.timeline),
            color_matrix=color.matrix,
            color_range=color.range,
            color_rule=color.rule,
            color_transfer=color.transfer,
            interlaced=normalizer.interlaced,
            notes=notes + normalizer.notes,
        )
    return result, taken.position, record


class _Take:
    """One choice of pictures, the arrays they are decoded into, and the frames made of them."""

    def __init__(
        self,
        timeline: Timeline,
        choice: Choice,
        *,
        position: int,
        intact: Collection[int] | None,
        bucket: BucketConfig,
        limits: LimitsConfig,
        buffer: np.ndarray | None,
    ) -> None:
        self.timeline, self.choice, self.position = timeline, choice, position
        self._sources = _sources(choice, timeline, intact, limits)
        shape = (bucket.num_frames, bucket.height, bucket.width, 3)
        if buffer is None:
            buffer = np.empty(math.prod(shape), np.uint8)
        self._frames = buffer[: math.prod(shape)].reshape(shape)
        self.homes: dict[int, np.ndarray] = {}
        """Tick of each picture to decode -> where: the first frame that shows it as it is, else aside."""
        self._owners: dict[int, int] = {}
        for i, (picture, blend) in enumerate(zip(choice.pictures, choice.blends, strict=True)):
            if not blend:
                self._owners.setdefault(self._sources[picture], i)
        for tick in self._sources.values():
            aside = tick not in self._owners
            self.homes[tick] = np.empty(shape[1:], np.uint8) if aside else self._frames[self._owners[tick]]

    @property
    def effective_fps(self) -> float:
        """Frames per second of source time; the source's own rate where time stands still."""
        step = self.choice.step * self.timeline.time_base
        return float(1 / step) if step else self.timeline.fps

    @property
    def repaired(self) -> list[int]:
        """Frames made from a stand-in for a damaged picture."""
        lost = {picture for picture, tick in self._sources.items() if tick != self.timeline.pts[picture]}
        shown = zip(self.choice.pictures, self.choice.blends, strict=True)
        return [i for i, (p, blend) in enumerate(shown) if p in lost or (blend and p + 1 in lost)]

    def finish(self) -> np.ndarray:
        """All frames, once `homes` are filled: copies for repeats, blends except across hard cuts."""
        if self.choice.interpolated:
            self.choice = unblended_at(self.choice, self._cuts(), timeline=self.timeline)
        for i, (picture, blend) in enumerate(zip(self.choice.pictures, self.choice.blends, strict=True)):
            tick = self._sources[picture]
            if blend:
                here = self.homes[tick].astype(np.uint16) * (ONE - blend)
                there = self.homes[self._sources[picture + 1]].astype(np.uint16) * blend
                self._frames[i] = (here + there + ONE // 2) // ONE
            elif self._owners.get(tick) != i:
                self._frames[i] = self.homes[tick]
        return self._frames

    def _cuts(self) -> set[int]:
        """Pictures followed by a hard cut, judged on every fourth pixel."""
        needed = self.choice.needed
        luma = {p: self.homes[self._sources[p]][::4, ::4] @ _LUMA for p in needed}
        return hard_cuts({p: float(np.abs(luma[p] - luma[p + 1]).mean()) for p in needed if p + 1 in luma})


def _sources(
    choice: Choice, timeline: Timeline, intact: Collection[int] | None, limits: LimitsConfig
) -> dict[int, int]:
    """Picture -> tick to take it from: its own, or once `intact` is known, its nearest intact neighbour's."""
    sources = {picture: timeline.pts[picture] for picture in choice.needed}
    if intact is None:
        return sources
    lost = [picture for picture, tick in sources.items() if tick not in intact]
    if not intact or len(lost) > limits.max_damage * len(sources):
        raise ClipError(
            "damaged",
            f"{len(lost)} of {len(sources)} wanted pictures are damaged, over limits.max_damage = "
            f"{limits.max_damage}",
        )
    ordered = sorted(intact)
    for picture in lost:
        tick = sources[picture]
        k = bisect.bisect_left(ordered, tick)
        _, sources[picture] = min((abs(near - tick), near) for near in ordered[max(0, k - 1) : k + 1])
    return sources
