"""Packets that carry a picture nobody is to see, known from their first bytes.

In: a packet of VP8 or VP9. Out: whether it puts a picture on screen. These codecs send reference pictures
that are never shown, some containers give them a time of their own, and choosing one as a frame would
find nothing. Other codecs show what they send, or say so only to a decoder.
"""

from __future__ import annotations


def shows(codec: str, data: memoryview) -> bool:
    """False where the packet's pictures are all hidden; True where that is not known."""
    if codec == "vp8":
        return bool(data[0] >> 4 & 1)  # RFC 6386, 9.1: show_frame
    return codec != "vp9" or any(_vp9_shows(data[start]) for start in _vp9_frames(data))


def _vp9_frames(data: memoryview) -> list[int]:
    """Where the frames of a packet begin (VP9 bitstream specification, annex B: superframes)."""
    marker = data[-1]
    count, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = len(data) - 2 - count * width
    if marker & 0xE0 != 0xC0 or index < 0 or data[index] != marker:
        return [0]
    starts, at = [], 0
    for k in range(index + 1, index + 1 + count * width, width):
        starts.append(at)
        at += int.from_bytes(data[k : k + width], "little")
    return [start for start in starts if start < index]


def _vp9_shows(first: int) -> bool:
    """The first byte of an uncompressed header (specification, 6.2): show_existing_frame or show_frame."""
    shift = 2 if first >> 4 & 3 == 3 else 3  # profile 3 has a reserved bit more
    return bool(first >> shift & 1) or bool(first >> shift - 2 & 1)
