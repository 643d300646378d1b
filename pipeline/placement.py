"""What becomes of one row: its window, its bucket, its frames, chosen before anything is decoded.

In: an open file and the settings. Out: a `Placement`, from the packets' timestamps alone; `decode_clip`
decodes it, `place_clip` reports it (`Placed`), after decoding every picture of the window where a full
check is asked for: same rules, nothing converted, nothing kept.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.activity import luma_activity
from pipeline.choice import Choice
from pipeline.clip import Decoded, Placed
from pipeline.color import check_color
from pipeline.frames import choose_frames, num_available, num_clips
from pipeline.media import LastMedia, Media, open_media
from pipeline.pictures import PictureDecoder
from pipeline.timeline import Timeline
from schemas.bucket import choose_bucket, own_lengths
from schemas.config import BucketConfig, FramesConfig, LimitsConfig, PictureConfig
from schemas.errors import ClipError, RunError

_PICTURE = PictureConfig()


@dataclass(frozen=True)
class Window:
    """The part of a file that is asked for, and how its frames are chosen."""

    frames: FramesConfig
    buckets: Sequence[BucketConfig]
    lengths: Sequence[Sequence[int]]
    """Per bucket how many frames a clip of it may have, ascending (`schemas.bucket.clip_lengths`)."""
    start_s: float | None = None
    end_s: float | None = None
    clip: int = 0

    def length(self, position: int, num_available: int) -> int:
        """Frames of a clip in the bucket at `position`: the most that are available, or the fewest."""
        lengths = self.lengths[position]
        return lengths[max(1, bisect.bisect_right(lengths, num_available)) - 1]

    def cut(self, timeline: Timeline) -> Timeline:
        return _cut(timeline, self.start_s, self.end_s)


@functools.lru_cache(maxsize=2)
def _cut(timeline: Timeline, start_s: float | None, end_s: float | None) -> Timeline:
    """Remembered, with what is derived from it: a long row makes many clips."""
    return timeline.window(start_s, end_s)


@dataclass(frozen=True)
class Placement:
    """The frames of one sample."""

    timeline: Timeline
    """Of the window."""
    position: int
    """Of the bucket in the config's buckets."""
    num_available: int
    choice: Choice
    activity: Sequence[int] | None
    """Of each picture, where it is exact."""


def place(
    media: Media, timeline: Timeline, window: Window, changes: Mapping[int, float] | None = None
) -> Placement:
    """Cut the window out of a file's `timeline`, choose bucket and frames.

    `changes`: mean luma change of each picture to the one before, where activity is exact. ClipError
    where the window cannot become a sample; RunError where `frames.short` stops the run.
    """
    timeline = window.cut(timeline)
    available = num_available(timeline, frames=window.frames)
    info = media.info
    position = choose_bucket(
        window.buckets,
        width=info.display_width,
        height=info.display_height,
        num_pictures=available,
        whole=window.frames.clips == "whole",
    )
    activity = None if changes is None else luma_activity(timeline, changes)
    choice = choose_frames(
        timeline,
        num_frames=window.length(position, available),
        frames=window.frames,
        clip=window.clip,
        activity=activity,
    )
    return Placement(timeline, position, available, choice, activity)


def place_clip(
    path: str | Path,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    frames: FramesConfig,
    buckets: Sequence[BucketConfig],
    lengths: Sequence[Sequence[int]] | None = None,
    picture: PictureConfig = _PICTURE,
    limits: LimitsConfig,
    full: bool = False,
    last: LastMedia | None = None,
) -> Placed:
    """What `decode_clip` would make of the same arguments, from the packets and one picture.

    `lengths` as of a `Window`; unset, a clip has its bucket's num_frames.
    ClipError where it would refuse before decoding; with `full` also where pictures of the window are
    damaged or missing. `frames.short = "error"` is a ClipError `too_short` here: a report goes on.
    """
    window = Window(frames, buckets, lengths or own_lengths(buckets), start_s, end_s)
    with (open_media if last is None else last.open)(path, limits=limits) as media:
        check_color(media.color, picture)
        timeline, decoded = media.packets.timeline, None
        if full:
            decoded, hidden = _decoded(media, window.cut(timeline), limits)
            timeline = timeline.without(hidden)
        try:
            placement = place(media, timeline, window)
        except RunError as error:
            raise ClipError("too_short", str(error)) from error
        num_frames = len(placement.choice.pictures)
        return Placed(
            info=media.info,
            bucket=placement.position,
            num_frames=num_frames,
            num_available=placement.num_available,
            num_clips=num_clips(placement.timeline, num_frames=num_frames, frames=frames),
            notes=[*media.packets.notes, *placement.choice.notes],
            decoded=decoded,
        )


def _decoded(media: Media, timeline: Timeline, limits: LimitsConfig) -> tuple[Decoded, set[int]]:
    """What a decode of all of `timeline` gives, and the pictures that are none; ClipError where too many
    are damaged or none is sound."""
    outcome = PictureDecoder(media, limits=limits).every(set(timeline.pts), lambda *_: None)
    hidden = outcome.hidden(timeline)
    sound = len(outcome.intact.intersection(timeline.pts))
    damaged = len(timeline.pts) - len(hidden) - sound
    if damaged > limits.max_damage * (sound + damaged):
        raise ClipError(
            "damaged",
            f"{damaged} of {sound + damaged} pictures are damaged, over limits.max_damage = "
            f"{limits.max_damage}",
        )
    if not sound:
        raise ClipError("no_pictures", f"none of {len(timeline.pts)} packets gives a sound picture")
    return Decoded(sound, damaged, len(hidden)), hidden
