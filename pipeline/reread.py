"""Reading parts of a file again whose packets were too many to keep.

In: an open video, and the outline of all its packets from the first reading. Out: the packets of some spans,
for about the bytes of those spans. Seeks are inexact in most containers and broken in some, so none is
believed: where one landed is recognised by what the outline knows of the packets that come, and each
packet must then have the size that belongs there. Where that fails, the file is read from its start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard
from av.video.stream import VideoStream

from pipeline.container import Video, open_container

NEAR_BYTES = 2**20
"""Of the video's packets up to the next span: that many are read rather than jumped."""
_STRAY = 200
"""Packets that may come after a seek before one is recognised."""


class Outline(NamedTuple):
    """What stays of a packet when its payload does not."""

    pts: int | None
    dts: int | None
    pos: int | None
    """Byte in the file, None where the container does not tell."""
    duration: int
    size: int
    key: bool
    shown: bool


class Rereader:
    """Reads spans of packets, by seeks as long as they land."""

    def __init__(self, video: Video, outline: Sequence[Outline], *, seekable: bool = True) -> None:
        """`seekable`: False where the outline's times are not those of the file."""
        self._video, self._outline = video, outline
        self._keys = [i for i, packet in enumerate(outline) if packet.key]
        self._places: dict[tuple[int | None, ...], int] = {}
        self._seekable = seekable
        self._seeking: tuple[InputContainer, VideoStream] | None = None
        twins = set()
        for i, packet in enumerate(outline):
            name = _name(packet.pos, packet.pts, packet.size)
            if self._places.setdefault(name, i) != i:
                twins.add(name)
        for name in twins:
            del self._places[name]

    def read(self, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Packet[VideoStream]]]:
        """(position, packet) of every packet in `spans`: sorted, disjoint, both ends included."""
        feed: Iterator[tuple[int, Packet[VideoStream]]] = iter(())
        at = len(self._outline)  # position of the next packet of `feed`
        for first, last in spans:
            if at > first or sum(packet.size for packet in self._outline[at:first]) > NEAR_BYTES:
                feed = self._from(first)
            for i, packet in feed:
                at = i + 1
                if i >= first:
                    yield i, packet
                if i >= last:
                    break

    def _from(self, first: int) -> Iterator[tuple[int, Packet[VideoStream]]]:
        """The packets from `first` or some before it on."""
        at = first
        if self._seekable:
            for i, packet in self._landed(first):
                known = self._outline[i]
                if packet.size != known.size:
                    break
                # Behind a seek, some containers do not know the times of the first packets.
                packet.pts, packet.dts = known.pts, known.dts
                yield i, packet
                at = i + 1
            if at == len(self._outline):
                return
            self._seekable = False
        container, stream = self._open()
        for i, packet in islice(enumerate(_payloads(container, stream)), at, None):
            packet.pts, packet.dts = self._outline[i].pts, self._outline[i].dts
            yield i, packet

    def _open(self) -> tuple[InputContainer, VideoStream]:
        """The file at its start, once more: a seek in the container of `video` would flush its decoder."""
        container = open_container(self._video.path)
        stream = container.streams[self._video.stream.index]
        assert isinstance(stream, VideoStream)
        for other in container.streams:
            if other is not stream:
                other.discard = Discard.all
        return container, stream

    def _landed(self, first: int) -> Iterator[tuple[int, Packet[VideoStream]]]:
        """The packets from `first` or some before it on, after a seek; nothing where none can be had."""
        if self._seeking is None:
            self._seeking = self._open()
        container, stream = self._seeking
        for target in self._targets(first):
            try:
                container.seek(target, stream=stream, backward=True)
                payloads = _payloads(container, stream)
                for packet in islice(payloads, _STRAY):
                    place = self._places.get(_name(packet.pos, packet.pts, packet.size))
                    if place is not None:
                        break
                else:
                    continue
            except av.FFmpegError:
                continue
            if place <= first:
                yield place, packet
                with suppress(av.FFmpegError):
                    yield from zip(range(place + 1, len(self._outline)), payloads, strict=False)
                return

    def _targets(self, first: int) -> Iterator[int]:
        """Times to seek to for the packet `first`, nearer ones first: containers disagree on whether it is
        a key packet's own or its decoding time that counts, and some land late."""
        for i in [first, *[key for key in reversed(self._keys) if key < first][:2]]:
            times = {time for time in (self._outline[i].pts, self._outline[i].dts) if time is not None}
            yield from sorted(times, reverse=True)


def _payloads(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    return (packet for packet in container.demux(stream) if packet.size)


def _name(pos: int | None, pts: int | None, size: int) -> tuple[int | None, ...]:
    """What a packet is known by: its place in the file, else its time."""
    return (pos, size) if pos is not None else (pos, pts, size)
