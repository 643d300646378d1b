"""A file opened to be decoded, and the one opened last, kept for its next row.

In: a path and limits. Out: a `Media`: its packets read once, its first picture decoded, its facts. Rows that
are windows or clips of one file come one after the other; keeping the last file spares them the
opening and the reading, for the memory of one file's packets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.clip import ClipInfo
from pipeline.color import Color, color_of
from pipeline.container import Video, open_video
from pipeline.packets import Packets, read_packets
from pipeline.probe import Warm, clip_info, first_picture
from schemas.config import LimitsConfig


@dataclass
class Media:
    """An open file."""

    video: Video
    packets: Packets
    info: ClipInfo
    color: Color
    """Of the first picture."""
    warm: Warm | None
    """What the decoder did to give the first picture, while it has done nothing else."""
    stack: ExitStack
    """Closes what is opened on the way."""
    limits: LimitsConfig
    reusable: bool = True
    """Whether the decoder, flushed, is as good as a new one: not once it has met damage or other sizes."""

    def take_warm(self) -> Warm | None:
        """`warm`, for the one who goes on from there."""
        warm, self.warm = self.warm, None
        return warm

    def use_one_thread(self) -> None:
        """Decode in one thread from here on: with more, an error shows up packets too late to tell whose
        it is."""
        if self.video.decoder.thread_count > 1:
            self.video = self.stack.enter_context(open_video(self.video.path, limits=self.limits))
            self.warm, self.reusable = None, False


@contextmanager
def open_media(path: str | Path, *, limits: LimitsConfig, threads: int = 1) -> Iterator[Media]:
    """Open the file at `path`; ClipError where it could not become a clip. `threads`: of its decoder."""
    with ExitStack() as stack:
        video = stack.enter_context(open_video(path, limits=limits, threads=threads))
        yield _media(video, stack, limits)


def _media(video: Video, stack: ExitStack, limits: LimitsConfig) -> Media:
    packets = read_packets(video, limits=limits)
    first, warm = first_picture(video, packets, limits=limits)
    info = clip_info(video, packets, first)
    return Media(video, packets, info, color_of(first), warm, stack, limits)


class LastMedia:
    """Opens files, and keeps the last one open as long as it stays the same and gives no trouble."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._key: tuple[object, ...] = ()
        self._media: Media | None = None

    @contextmanager
    def open(self, path: str | Path, *, limits: LimitsConfig, threads: int = 1) -> Iterator[Media]:
        """As `open_media`."""
        key = (str(path), threads, limits, *_identity(path))
        if self._media is None or key != self._key:
            self.close()
            self._media = self._stack.enter_context(open_media(path, limits=limits, threads=threads))
            self._key = key
        try:
            yield self._media
        except BaseException:
            self.close()
            raise
        if not self._media.reusable:
            self.close()

    def close(self) -> None:
        self._media = None
        self._stack.close()


def _identity(path: str | Path) -> tuple[int, ...]:
    """What tells a file from another, or from itself before a change; () where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
