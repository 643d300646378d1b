"""Opening a video file safely, and one pass over its packets.

In: a path and limits. Out: an open `Video` and its `Packets`: payloads, decode order and timeline. The
packets are kept, so the decoder can be fed any part again without a second open and without a seek
(seeks are inexact or broken in several containers). Above `KEEP_BYTES` only their outline is kept and
a second reading fetches the payloads: more reading, bounded memory.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from pipeline.timeline import Timeline
from schemas.config import LimitsConfig
from schemas.errors import ClipError, RunError

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,obu,ivf,"
    "gif,apng,flv,asf,ogg,mxf,nut,dv,yuv4mpegpipe"
)
"""Demuxers a file may ask for. Playlists and image lists (hls, dash, concat, image2) stay out: they make
FFmpeg open other files."""
KEEP_BYTES = 256 * 2**20
"""Packets of a file are kept in memory up to this many bytes."""

_CONTENT_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own VP8 and VP9 decoders drop the alpha channel."""


@dataclass(frozen=True)
class Video:
    """An open file: its video stream and a single-threaded decoder for it."""

    path: str
    container: InputContainer
    stream: VideoStream
    decoder: VideoCodecContext
    file_bytes: int

    @property
    def sar(self) -> Fraction:
        """Width over height of one sample; 1 where the file does not say."""
        return self.stream.sample_aspect_ratio or Fraction(1)

    @property
    def container_name(self) -> str:
        return self.container.format.name.split(",")[0]


@contextmanager
def open_video(path: str | Path, *, limits: LimitsConfig) -> Iterator[Video]:
    """Open `path` and find its video stream and decoder; ClipError says what is wrong with the file."""
    path = str(path)
    file_bytes = _regular_file_bytes(path, limits)
    try:
        container = _open(path)
    except av.error.ArgumentError as error:
        raise ClipError("format_refused", f"not one of the supported containers: {describe(error)}") from error
    except (av.FFmpegError, OSError) as error:
        raise ClipError("open_failed", f"cannot be opened as a video: {describe(error)}") from error
    with container:
        stream = _video_stream(container)
        if stream is None:
            found = ", ".join(sorted({other.type for other in container.streams})) or "nothing"
            raise ClipError("no_video_stream", f"the file holds no video stream, only {found}")
        for other in container.streams:
            if other is not stream:
                other.discard = Discard.all
        decoder = _decoder(stream)
        check_pixels(decoder.width, decoder.height, limits)
        yield Video(path, container, stream, decoder, file_bytes)


def check_pixels(width: int, height: int, limits: LimitsConfig) -> None:
    """ClipError `limit_pixels` for a picture larger than allowed."""
    if width * height > limits.max_pixels:
        raise ClipError(
            "limit_pixels",
            f"a picture of {width} x {height} = {width * height} pixels is over "
            f"limits.max_pixels = {limits.max_pixels}",
        )


def describe(error: Exception) -> str:
    """One line for a person: the error's text and FFmpeg's last log line, without path or number."""
    if not isinstance(error, av.FFmpegError):
        return str(error)
    log = error.log[1] if isinstance(error.log, tuple) else None
    return f"{error.strerror} ({log[1]}: {log[2].strip()})" if log else str(error.strerror)


@dataclass(frozen=True)
class Packets:
    """The packets of the video stream in decode order; the lists run in parallel."""

    video: Video
    timeline: Timeline
    pts: Sequence[int | None]
    keys: Sequence[bool]
    kept: Sequence[Packet[VideoStream]] | None
    """None above KEEP_BYTES."""
    timed: bool
    """False where packets carry no timestamps (raw streams): pictures are then known by their order."""
    damage: str
    """Why reading stopped before the end of the file; empty if it did not."""

    def read(self, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Packet[VideoStream]]]:
        """(position, packet) of every packet in `spans`: sorted, disjoint, both ends included."""
        if self.kept is not None:
            for first, last in spans:
                for i in range(first, last + 1):
                    yield i, self.kept[i]
            return
        with _open(self.video.path) as container:
            stream = container.streams[self.video.stream.index]
            assert isinstance(stream, VideoStream)
            packets = enumerate(packet for packet in container.demux(stream) if packet.size)
            for first, last in spans:
                for i, packet in packets:
                    if i >= first:
                        yield i, packet
                    if i == last:
                        break


def read_packets(video: Video, *, limits: LimitsConfig) -> Packets:
    """Read every packet once, without decoding; ClipError over a limit or when there is none."""
    pts: list[int | None] = []
    keys: list[bool] = []
    shown: dict[int, tuple[int, bool, int]] = {}
    kept: list[Packet[VideoStream]] | None = []
    total_bytes, damage = 0, ""
    seconds = Fraction(video.stream.time_base or 1)
    try:
        for packet in video.container.demux(video.stream):
            if not packet.size:
                continue
            if packet.has_sidedata("encryption_info"):
                raise ClipError("encrypted", "the video is encrypted (DRM) and cannot be decoded without its key")
            if len(pts) >= limits.max_frames:
                raise ClipError("limit_frames", f"more packets than limits.max_frames = {limits.max_frames}")
            total_bytes += packet.size
            if total_bytes > KEEP_BYTES:
                kept = None
            if kept is not None:
                kept.append(packet)
            pts.append(packet.pts)
            keys.append(packet.is_keyframe)
            if packet.pts is not None and not packet.is_discard:
                size, key, _ = shown.get(packet.pts, (0, False, 0))
                shown[packet.pts] = (size + packet.size, key or packet.is_keyframe, packet.duration or 0)
    except MemoryError as error:
        raise ClipError("limit_memory", f"no memory for the packets: {error}") from error
    except av.FFmpegError as error:
        damage = f"the file breaks off after {len(pts)} packets: {describe(error)}"
    if not pts:
        raise ClipError("no_pictures", damage or "the video stream holds no packets")
    timed = 2 * len(shown) > len(pts) or all(tick is not None for tick in pts)
    if timed and shown:
        order = sorted(shown)
        end = order[-1] + (shown[order[-1]][2] or _usual_interval(order, video.stream, seconds))
        facts = [shown[tick] for tick in order]
    else:
        seconds = 1 / (video.stream.guessed_rate or video.stream.average_rate or Fraction(25))
        order, end = list(range(len(pts))), len(pts)
        facts = [(packet.size, packet.is_keyframe, 1) for packet in kept or ()] or [(1, False, 1)] * len(pts)
    timeline = Timeline(
        time_base=seconds,
        origin=order[0],
        pts=tuple(order),
        end=end,
        sizes=tuple(size for size, _, _ in facts),
        keys=tuple(key for _, key, _ in facts),
    )
    if timeline.duration_s > limits.max_seconds:
        raise ClipError(
            "limit_seconds",
            f"{timeline.duration_s:.1f} s long, over limits.max_seconds = {limits.max_seconds}",
        )
    return Packets(video, timeline, pts, keys, kept, timed, damage)
