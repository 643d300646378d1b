"""The packets of a video: one pass over the file, nothing decoded.

In: an open `Video`. Out: `Packets`: payloads in decode order, and the timeline they add up to. Payloads are
kept, so the decoder can be fed any part again without a second open and without a seek (seeks are
inexact or broken in several containers). Above `KEEP_BYTES` only their outline is kept and what is needed
is read again: more reading, bounded memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import av
from av.packet import Packet
from av.video.stream import VideoStream

from pipeline.container import Video
from pipeline.hidden import shows
from pipeline.reread import Outline, Rereader
from pipeline.timeline import MAX_GAP, Timeline
from schemas.config import LimitsConfig
from schemas.errors import ClipError

FAR_S = 1.0
"""Times that go back by more than this many seconds are another recording's."""
HOLE_S = 1.0
"""A longer time without a new picture is noted, unless the clip is like that throughout."""
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
    notes: tuple[str, ...]
    """What is odd about the packets, a sentence each: the file breaks off, its times jump."""

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
    joined, codec = _Joined(), video.codec
    earliest: int | None = None
    try:
        for packet in video.container.demux(video.stream):
            if not packet.size:
                continue
            if packet.has_sidedata("encryption_info"):
                raise ClipError("encrypted", "the video is encrypted (DRM); it needs a key to be decoded")
            if len(outline) == limits.max_frames:
                raise ClipError("limit_frames", f"more packets than limits.max_frames = {limits.max_frames}")
            joined.take(packet)
            total_bytes += packet.size
            if total_bytes > KEEP_BYTES:
                kept = None
            if kept is not None:
                kept.append(packet)
            shown = not packet.is_discard and shows(codec, memoryview(packet))
            outline.append(
                Outline(
                    packet.pts,
                    packet.dts,
                    packet.pos,
                    packet.duration or 0,
                    packet.size,
                    packet.is_keyframe,
                    shown,
                )
            )
            if packet.pts is not None and shown:
                earliest = packet.pts if earliest is None else min(earliest, packet.pts)
                _check_seconds(float((packet.pts - earliest) * (packet.time_base or 0)), limits)
    except MemoryError as error:
        raise ClipError("limit_memory", f"no memory for the packets: {error}") from error
    except av.FFmpegError as error:
        damage = f"the file breaks off after {len(outline)} packets: {error.strerror}"
    if not outline:
        raise ClipError("no_pictures", damage or "the video stream holds no packets")
    timed = _timed(outline)
    timeline = _timeline(outline, video.stream, timed=timed)
    _check_seconds(timeline.duration_s, limits)
    if len(timeline.pts) > 2 and timeline.fps > limits.max_fps:  # fewer have no rate to speak of
        raise ClipError(
            "limit_fps", f"{timeline.fps:g} pictures per second, over limits.max_fps = {limits.max_fps:g}"
        )
    pts = [packet.pts for packet in outline]
    known = [tick for tick in pts if tick is not None]
    numbered = video.container_name == "avi" and video.decoder.has_b_frames and known == sorted(known)
    keys = [packet.key for packet in outline]
    again = Rereader(video, outline, seekable=not joined.jumps) if kept is None else kept
    notes = [damage] if damage else []
    if joined.jumps:
        often = "once" if joined.jumps == 1 else f"{joined.jumps} times"
        notes.append(f"its times go back {often}: the parts are taken one after the other")
    return Packets(video, timeline, pts, keys, again, timed and not numbered, (*notes, *_holes(timeline)))


def _check_seconds(seconds: float, limits: LimitsConfig) -> None:
    if seconds > limits.max_seconds:
        raise ClipError(
            "limit_seconds", f"{seconds:.1f} s or longer, over limits.max_seconds = {limits.max_seconds}"
        )


class _Joined:
    """Moves the times of packets where recordings were joined without giving them a common clock."""

    def __init__(self) -> None:
        self.jumps = 0
        self._moved, self._end = 0, 0
        self._last_dts: int | None = None

    def take(self, packet: Packet[VideoStream]) -> None:
        """A part that begins before the last one ended is moved behind it. Without B-pictures out of place:
        only at a key packet, or where the jump is far."""
        last, self._last_dts = self._last_dts, packet.dts
        if packet.pts is None or packet.dts is None:
            return
        if last is not None and packet.dts < last:
            far = (last - packet.dts) * (packet.time_base or 0) > FAR_S
            if packet.is_keyframe or far:
                self._moved = self._end - packet.pts
                self.jumps += 1
        if self._moved:
            packet.pts += self._moved
            packet.dts += self._moved
        self._end = max(self._end, packet.pts + max(packet.duration or 0, 1))


def _holes(timeline: Timeline) -> Iterator[str]:
    """A note on the longest time without a new picture, where it is out of the ordinary."""
    gaps = [b - a for a, b in pairwise(timeline.pts)]
    longest = max(gaps, default=0)
    if longest * timeline.time_base > HOLE_S and longest > MAX_GAP * statistics.median(gaps):
        at = timeline.seconds(timeline.pts[gaps.index(longest)])
        yield f"no new picture for {float(longest * timeline.time_base):.1f} s after {at:.1f} s"


def _timed(outline: Sequence[Outline]) -> bool:
    """Whether timestamps can be relied on: most packets have one (the second of a field pair may not), and
    no two pictures with times of their own to be decoded at share one to be shown at."""
    if 2 * sum(packet.pts is not None for packet in outline) < len(outline):
        return False
    decoded: dict[int, int | None] = {}
    return all(
        decoded.setdefault(packet.pts, packet.dts) == packet.dts
        for packet in outline
        if packet.pts is not None and packet.shown
    )


def _timeline(outline: Sequence[Outline], stream: VideoStream, *, timed: bool) -> Timeline:
    """Presentation order of the packets that show a picture; without timestamps, a constant rate."""
    rate = stream.guessed_rate or stream.average_rate or Fraction(25)
    if not timed:
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
