"""The packets of a video: one pass over the file, nothing decoded.

In: an open `Video`. Out: `Packets`: payloads in decode order, and the timeline they add up to. Payloads are
kept, so the decoder can be fed any part again without a second open and without a seek (seeks are
inexact or broken in several containers). Above `KEEP_BYTES` only their outline is kept and what is needed
is read again: more reading, bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import av
from av.packet import Packet
from av.video.stream import VideoStream

from pipeline.container import Video
from pipeline.reread import Outline, Rereader
from pipeline.timeline import Timeline
from schemas.config import LimitsConfig
from schemas.errors import ClipError

KEEP_BYTES = 256 * 2**20
"""Payloads of a file are kept in memory up to this many bytes."""


@dataclass(frozen=True)
class Packets:
    """The packets of the video stream in decode order; the lists run in parallel."""

    video: Video
    timeline: Timeline
    pts: Sequence[int | None]
    keys: Sequence[bool]
    kept: Sequence[Packet[VideoStream]] | Rereader
    """The packets, or above KEEP_BYTES what gets them again."""
    timed: bool
    """False where packets carry no timestamps (raw streams) or number the decode order (B-pictures in
    AVI): the n-th picture to come out is then the n-th of the timeline."""
    damage: str
    """Why reading stopped before the end of the file; empty if it did not."""

    def read(self, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Packet[VideoStream]]]:
        """(position, packet) of every packet in `spans`: sorted, disjoint, both ends included."""
        if isinstance(self.kept, Rereader):
            yield from self.kept.read(spans)
        else:
            for first, last in spans:
                for i in range(first, last + 1):
                    yield i, self.kept[i]


def read_packets(video: Video, *, limits: LimitsConfig) -> Packets:
    """Read every packet once, without decoding; ClipError over a limit or when there is none."""
    outline: list[Outline] = []
    kept: list[Packet[VideoStream]] | None = []
    total_bytes, damage = 0, ""
    try:
        for packet in video.container.demux(video.stream):
            if not packet.size:
                continue
            if packet.has_sidedata("encryption_info"):
                raise ClipError("encrypted", "the video is encrypted (DRM); it needs a key to be decoded")
            if len(outline) == limits.max_frames:
                raise ClipError("limit_frames", f"more packets than limits.max_frames = {limits.max_frames}")
            total_bytes += packet.size
            if total_bytes > KEEP_BYTES:
                kept = None
            if kept is not None:
                kept.append(packet)
            outline.append(
                Outline(
                    packet.pts,
                    packet.dts,
                    packet.pos,
                    packet.duration or 0,
                    packet.size,
                    packet.is_keyframe,
                    not packet.is_discard,
                )
            )
    except MemoryError as error:
        raise ClipError("limit_memory", f"no memory for the packets: {error}") from error
    except av.FFmpegError as error:
        damage = f"the file breaks off after {len(outline)} packets: {error.strerror}"
    if not outline:
        raise ClipError("no_pictures", damage or "the video stream holds no packets")
    timeline = _timeline(outline, video.stream)
    if timeline.duration_s > limits.max_seconds:
        raise ClipError(
            "limit_seconds",
            f"{timeline.duration_s:.1f} s long, over limits.max_seconds = {limits.max_seconds}",
        )
    pts = [packet.pts for packet in outline]
    known = [tick for tick in pts if tick is not None]
    numbered = video.container_name == "avi" and video.decoder.has_b_frames and known == sorted(known)
    timed = _mostly_timed(outline) and not numbered
    keys = [packet.key for packet in outline]
    return Packets(
        video, timeline, pts, keys, Rereader(video, outline) if kept is None else kept, timed, damage
    )


def _mostly_timed(outline: Sequence[Outline]) -> bool:
    """Whether timestamps can be relied on; the second packet of a field pair may lack one."""
    return 2 * sum(packet.pts is not None for packet in outline) >= len(outline)


def _timeline(outline: Sequence[Outline], stream: VideoStream) -> Timeline:
    """Presentation order of the packets that show a picture; without timestamps, a constant rate."""
    rate = stream.guessed_rate or stream.average_rate or Fraction(25)
    if not _mostly_timed(outline):
        pictures, backward = {i: packet._replace(duration=1) for i, packet in enumerate(outline)}, set[int]()
        time_base = 1 / rate
    else:
        pictures, backward = {}, set()
        latest: int | None = None
        for packet in outline:
            if packet.pts is not None and packet.shown:
                if latest is not None and packet.pts < latest:
                    backward.add(packet.pts)
                latest = packet.pts if latest is None else max(latest, packet.pts)
                twin = pictures.get(packet.pts)
                pictures[packet.pts] = packet if twin is None else packet._replace(key=packet.key or twin.key)
        time_base = stream.time_base or 1 / rate
    if not pictures:
        raise ClipError("no_pictures", "the file's edit list hides every picture")
    pts = sorted(pictures)
    last = pictures[pts[-1]].duration
    if last <= 0:
        steps = sorted(b - a for a, b in pairwise(pts))
        last = steps[len(steps) // 2] if steps else max(1, round(1 / (rate * time_base)))
    return Timeline(
        time_base=time_base,
        origin=pts[0],
        pts=tuple(pts),
        end=pts[-1] + last,
        sizes=tuple(pictures[tick].size for tick in pts),
        keys=tuple(pictures[tick].key for tick in pts),
        backward=tuple(tick in backward for tick in pts),
    )
