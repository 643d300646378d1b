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

Lines of interlaced pictures are rebuilt from the pictures around, which are then decoded too. The first
picture decides; where interlaced ones only turn up later, the clip is decoded once more.

F frames, H, W pixels of the bucket.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.clip import ClipRecord
from pipeline.color import check_color
from pipeline.frames import frame_weights
from pipeline.luma import luma_changes
from pipeline.media import LastMedia, Media, open_media
from pipeline.normalize import Normalizer
from pipeline.pictures import Backend, Outcome, PictureDecoder
from pipeline.placement import Placement, Window, place
from pipeline.take import Take
from pipeline.timeline import Timeline
from schemas.bucket import own_lengths
from schemas.config import BucketConfig, DecodeConfig, FramesConfig, LimitsConfig, PictureConfig, ResizeConfig
from schemas.errors import ClipError

_PICTURE, _DECODE = PictureConfig(), DecodeConfig()


def decode_clip(
    path: str | Path,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    clip: int = 0,
    frames: FramesConfig,
    buckets: Sequence[BucketConfig],
    lengths: Sequence[Sequence[int]] | None = None,
    resize: ResizeConfig,
    picture: PictureConfig = _PICTURE,
    decode: DecodeConfig = _DECODE,
    limits: LimitsConfig,
    buffer: np.ndarray | None = None,
    last: LastMedia | None = None,
) -> tuple[np.ndarray, int, ClipRecord]:
    """Frames [F, H, W, 3] of the clip, the position of their bucket, and their record.

    `lengths` as of a `Window`; unset, a clip has its bucket's num_frames. `clip`: which of the clips of its
    window. `buffer`, flat uint8 large enough for any bucket, takes the
    frames if given; the result is then a view of it. `last` keeps the file open for its next row.
    ClipError where the file or the window cannot become a sample.
    """
    window = Window(frames, buckets, lengths or own_lengths(buckets), start_s, end_s, clip)
    settings = _Settings(window, resize, picture, decode, limits, buffer)
    with (open_media if last is None else last.open)(path, limits=limits, threads=decode.threads) as media:
        check_color(media.color, picture)
        rebuild = picture.deinterlace == "bwdif" and decode.backend == "pyav"
        made = _make(media, settings, deinterlace=rebuild and media.info.interlaced)
        if rebuild and made.normalizer.interlaced and not media.info.interlaced:
            made = _make(media, settings, deinterlace=True)
        result = made.take.finish()
        return result, made.placement.position, _record(media, made, clip=clip)


@dataclass(frozen=True)
class _Settings:
    window: Window
    resize: ResizeConfig
    picture: PictureConfig
    decode: DecodeConfig
    limits: LimitsConfig
    buffer: np.ndarray | None


@dataclass(frozen=True)
class _Made:
    """A sample whose pictures are decoded."""

    placement: Placement
    take: Take
    normalizer: Normalizer
    outcome: Outcome
    notes: list[str]


def _make(media: Media, settings: _Settings, *, deinterlace: bool) -> _Made:
    """Place the sample, decode its pictures by plan, and where that is in doubt, in order."""
    frames, limits = settings.window.frames, settings.limits
    timeline = media.packets.timeline
    pictures = PictureDecoder(media, limits=limits)
    notes = list(media.packets.notes)
    changes: dict[int, float] | None = None

    def prepare(
        timeline: Timeline, intact: Collection[int] | None = None
    ) -> tuple[Placement, Take, Normalizer]:
        placement = place(media, timeline, settings.window, changes)
        bucket = settings.window.buckets[placement.position]
        take = Take(
            placement.timeline,
            placement.choice,
            intact=intact,
            bucket=bucket,
            limits=limits,
            buffer=settings.buffer,
        )
        pictures.deinterlace = timeline.pts if deinterlace else None
        normalizer = Normalizer(bucket, resize=settings.resize, picture=settings.picture, sar=media.video.sar)
        return placement, take, normalizer

    if frames.policy == "keyframe" and frames.activity == "exact":
        changes, hidden = luma_changes(pictures, settings.window.cut(timeline))
        timeline = timeline.without(hidden)
    placement, take, normalizer = prepare(timeline)
    decoder: Backend = pictures
    if settings.decode.backend != "pyav":
        from pipeline.backends import open_backend  # torch takes seconds to load

        decoder = open_backend(media.video, media.packets, decode=settings.decode, limits=limits)
    outcome = decoder.planned(take.homes, normalizer)
    if outcome.doubt:
        notes.append(f"decoded in order: {outcome.doubt}")
        outcome = decoder.in_order(take.homes, normalizer)
        hidden = outcome.hidden(timeline)
        if not outcome.intact.issuperset(take.homes) or hidden & pictures.needed(take.homes):
            timeline = timeline.without(hidden)
            placement, take, normalizer = prepare(timeline, outcome.intact)
            outcome = decoder.in_order(take.homes, normalizer)
            if not outcome.intact.issuperset(take.homes):
                raise ClipError("damaged", f"its pictures do not decode twice alike: {outcome.doubt}")
    if len(timeline.pts) < (count := len(media.packets.timeline.pts)):
        notes.append(f"{count - len(timeline.pts)} of {count} packets show no picture")
    return _Made(placement, take, normalizer, outcome, notes)


def _record(media: Media, made: _Made, *, clip: int) -> ClipRecord:
    info, take = media.info, made.take
    interlaced = info.interlaced or made.normalizer.interlaced or made.outcome.deinterlaced
    odd = ["interlaced: lines rebuilt by bwdif"] if made.outcome.deinterlaced else []
    if info.interlaced and not (odd or made.normalizer.interlaced):
        odd = ["interlaced: as the backend gives it"]
    sars = ", ".join(sorted(f"{sar.numerator}:{sar.denominator}" for sar in made.outcome.sars))
    if len(made.outcome.sars) > 1:
        odd.append(f"the sample aspect ratio changes ({sars}); {info.sar} is used throughout")
    return ClipRecord(
        codec=info.codec,
        container=info.container,
        source_width=info.width,
        source_height=info.height,
        rotation=info.rotation,
        sar=info.sar,
        source_fps=take.timeline.fps,
        duration_s=take.timeline.duration_s,
        num_pictures=len(take.timeline.pts),
        pts_s=[round(take.timeline.seconds(tick), 6) for tick in take.ticks],
        coverage=take.choice.coverage,
        effective_fps=take.effective_fps,
        interpolated=take.choice.interpolated,
        duplicated=take.duplicated,
        clip=clip,
        num_fed=made.outcome.num_fed,
        repaired=take.repaired,
        frame_weights=frame_weights(take.choice, take.timeline, made.placement.activity),
        color_matrix=info.color_matrix,
        color_range=info.color_range,
        color_rule=info.color_rule,
        color_transfer=info.color_transfer,
        interlaced=interlaced,
        notes=[*made.notes, *take.choice.notes, *odd, *made.normalizer.notes],
    )
