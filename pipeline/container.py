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
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import av
from av.codec.context import ThreadType
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
    def codec(self) -> str:
        """Name of the codec, whichever decoder serves it."""
        return self.decoder.codec.canonical_name

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
    log: Any = error.log  # (level, component, message); the annotation says otherwise
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
    outline: list[_Outline] = []
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
                _Outline(
                    packet.pts, packet.duration or 0, packet.size, packet.is_keyframe, not packet.is_discard
                )
            )
    except MemoryError as error:
        raise ClipError("limit_memory", f"no memory for the packets: {error}") from error
    except av.FFmpegError as error:
        damage = f"the file breaks off after {len(outline)} packets: {describe(error)}"
    if not outline:
        raise ClipError("no_pictures", damage or "the video stream holds no packets")
    timed = 2 * sum(packet.pts is not None for packet in outline) >= len(outline)
    timeline = _timeline(outline, video.stream, timed=timed)
    if timeline.duration_s > limits.max_seconds:
        raise ClipError(
            "limit_seconds",
            f"{timeline.duration_s:.1f} s long, over limits.max_seconds = {limits.max_seconds}",
        )
    pts = [packet.pts for packet in outline]
    return Packets(video, timeline, pts, [packet.key for packet in outline], kept, timed, damage)


class _Outline(NamedTuple):
    """What stays of a packet when its payload does not."""

    pts: int | None
    duration: int
    size: int
    key: bool
    shown: bool


def _timeline(outline: Sequence[_Outline], stream: VideoStream, *, timed: bool) -> Timeline:
    """Presentation order of the packets that show a picture; without timestamps, a constant rate."""
    rate = stream.guessed_rate or stream.average_rate or Fraction(25)
    if not timed:
        pictures = {i: packet._replace(duration=1) for i, packet in enumerate(outline)}
        time_base = 1 / rate
    else:
        pictures = {}
        for packet in outline:
            if packet.pts is not None and packet.shown:
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
    )


def _regular_file_bytes(path: str, limits: LimitsConfig) -> int:
    """Size of a regular, non-empty file within limits; opening anything else could hang."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _CONTENT_ERRORS:
            raise RunError(f"{path} cannot be read now: {error}") from error
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ClipError("open_failed", f"cannot be opened: {reason}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise ClipError("open_failed", f"expected a regular file, found {kind}")
    if found.st_size == 0:
        raise ClipError("empty_file", "the file is empty")
    if found.st_size > limits.max_bytes:
        raise ClipError(
            "limit_bytes", f"{found.st_size} bytes, over limits.max_bytes = {limits.max_bytes}"
        )
    return found.st_size


def _open(path: str) -> InputContainer:
    # "file:" keeps a name such as "http:..." or "-x" a file name; metadata may be in any encoding.
    options = {"protocol_whitelist": "file,pipe", "format_whitelist": FORMATS}
    return av.open(f"file:{os.path.abspath(path)}", metadata_errors="ignore", options=options)


def _video_stream(container: InputContainer) -> VideoStream | None:
    """FFmpeg's best video stream that is not cover art."""
    best = container.streams.best("video")
    candidates = [best] if isinstance(best, VideoStream) else []
    candidates += container.streams.video
    return next((s for s in candidates if not s.disposition & Disposition.attached_pic), None)


def _decoder(stream: VideoStream) -> VideoCodecContext:
    # A stream whose codec FFmpeg cannot name has no context, although the annotation promises one.
    decoder: VideoCodecContext | None = stream.codec_context
    if decoder is None:
        raise ClipError("no_decoder", "this build of FFmpeg has no decoder for the video stream's codec")
    if stream.metadata.get("alpha_mode") == "1" and decoder.codec.canonical_name in _ALPHA_DECODERS:
        size = (decoder.width, decoder.height)
        decoder = av.CodecContext.create(_ALPHA_DECODERS[decoder.codec.canonical_name], "r")
        assert isinstance(decoder, VideoCodecContext)
        decoder.width, decoder.height = size
    decoder.thread_count = 1
    decoder.thread_type = ThreadType.NONE
    return decoder
