"""Opening a video file safely.

In: a path and limits. Out: an open `Video`: container, video stream, decoder; or ClipError
with what is wrong. Only regular files, only file formats that hold everything themselves, only the file
protocol: nothing a file says can make FFmpeg open another one.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.codec.context import ThreadType
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from schemas.config import LimitsConfig
from schemas.errors import ClipError, RunError

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,obu,ivf,"
    "gif,apng,flv,asf,ogg,mxf,nut,dv,yuv4mpegpipe"
)
"""Demuxers a file may ask for. Playlists and image lists (hls, dash, concat, image2) stay out: they make
FFmpeg open other files."""

_DECLARING = ("mov", "matroska")
"""Formats whose header states how long the file is."""
_CONTENT_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own VP8 and VP9 decoders drop the alpha channel."""


@dataclass(frozen=True)
class Video:
    """An open file: its video stream and a decoder for it."""

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
def open_video(path: str | Path, *, limits: LimitsConfig, threads: int = 1) -> Iterator[Video]:
    """Open `path` and find its video stream and decoder; ClipError says what is wrong with the file."""
    path = str(path)
    file_bytes = _regular_file_bytes(path, limits)
    try:
        container = open_container(path)
    except av.error.ArgumentError as error:
        raise ClipError(
            "format_refused", f"not one of the supported containers: {describe(error)}"
        ) from error
    except MemoryError as error:
        raise ClipError("limit_memory", f"no memory to open the file: {describe(error)}") from error
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
        _check_declared(container, stream, limits)
        decoder = _decoder(stream, threads)
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


def _check_declared(container: InputContainer, stream: VideoStream, limits: LimitsConfig) -> None:
    """ClipError where a header says that the file is over a limit: nothing of it is read then.

    What a header says is never believed in the file's favour: packets are counted and timed as they come.
    """
    if container.format.name.split(",")[0] not in _DECLARING:
        return  # FFmpeg estimates
    seconds = (container.duration or 0) / av.time_base
    if seconds > limits.max_seconds:
        found = f"the header declares {seconds:.1f} s"
        raise ClipError("limit_seconds", f"{found}, over limits.max_seconds = {limits.max_seconds}")
    if stream.frames > limits.max_frames:
        found = f"the header declares {stream.frames} pictures"
        raise ClipError("limit_frames", f"{found}, over limits.max_frames = {limits.max_frames}")


def describe(error: Exception) -> str:
    """One line for a person: the error's text and FFmpeg's last log line, without path or number."""
    if not isinstance(error, av.FFmpegError):
        return str(error)
    log: Any = error.log  # (level, component, message); the annotation says otherwise
    return f"{error.strerror} ({log[1]}: {log[2].strip()})" if log else str(error.strerror)


def _regular_file_bytes(path: str, limits: LimitsConfig) -> int:
    """Size of a regular, non-empty file within limits; opening anything else could hang."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _CONTENT_ERRORS:
            raise RunError(f"cannot be read now: {error}") from error
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ClipError("open_failed", f"cannot be opened: {reason}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise ClipError("open_failed", f"expected a regular file, found {kind}")
    if found.st_size == 0:
        raise ClipError("empty_file", "the file is empty")
    if found.st_size > limits.max_bytes:
        raise ClipError("limit_bytes", f"{found.st_size} bytes, over limits.max_bytes = {limits.max_bytes}")
    return found.st_size


def open_container(path: str) -> InputContainer:
    # "file:" keeps a name such as "http:..." or "-x" a file name; metadata may be in any encoding.
    options = {"protocol_whitelist": "file,pipe", "format_whitelist": FORMATS}
    return av.open(f"file:{os.path.abspath(path)}", metadata_errors="ignore", options=options)


def _video_stream(container: InputContainer) -> VideoStream | None:
    """FFmpeg's best video stream that is not cover art."""
    best = container.streams.best("video")
    candidates = [best] if isinstance(best, VideoStream) else []
    candidates += container.streams.video
    return next((s for s in candidates if not s.disposition & Disposition.attached_pic), None)


def _decoder(stream: VideoStream, threads: int) -> VideoCodecContext:
    # A stream whose codec FFmpeg cannot name has no context, although the annotation promises one.
    decoder: VideoCodecContext | None = stream.codec_context
    if decoder is None:
        raise ClipError("no_decoder", "this build of FFmpeg has no decoder for the video stream's codec")
    if stream.metadata.get("alpha_mode") == "1" and decoder.codec.canonical_name in _ALPHA_DECODERS:
        whole = av.CodecContext.create(_ALPHA_DECODERS[decoder.codec.canonical_name], "r")
        assert isinstance(whole, VideoCodecContext)
        whole.width, whole.height = decoder.width, decoder.height
        decoder = whole
    decoder.thread_count = threads
    decoder.thread_type = ThreadType.FRAME if threads > 1 else ThreadType.NONE
    return decoder
