"""What is in a video file: the facts of its packets and of its first picture.

In: an open video whose packets have been read. Out: its first picture, and a `ClipInfo`. The one picture
is what a container cannot tell reliably: that a decoder works, the pixel format, rotation and colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import av
from av.video.frame import VideoFrame

from pipeline.clip import ClipInfo
from pipeline.color import color_of
from pipeline.container import Video, check_pixels, describe
from pipeline.geometry import display_size, orientation_of
from pipeline.packets import Packets
from schemas.config import LimitsConfig
from schemas.errors import ClipError


@dataclass(frozen=True)
class Warm:
    """A decoder that has been fed from the first packet on, until a picture came out."""

    fed: int
    """Packets it has got."""
    pictures: Sequence[VideoFrame]
    """What came out, all of it with the last of them."""


def first_picture(video: Video, packets: Packets, *, limits: LimitsConfig) -> tuple[VideoFrame, Warm | None]:
    """The first picture that decodes, and the state of the decoder where one can go on from there: no error
    so far, not drained. ClipError where there is no picture."""
    failure = ""
    fed = 0
    all_packets = (packet for _, packet in packets.read([(0, len(packets.pts) - 1)]))
    for packet in chain(all_packets, [None]):
        try:
            pictures = video.decoder.decode(packet)
        except MemoryError as error:
            raise ClipError("limit_memory", f"no memory for a picture: {error}") from error
        except av.error.DecoderNotFoundError as error:
            raise ClipError("no_decoder", f"no decoder for this codec: {describe(error)}") from error
        except av.FFmpegError as error:
            failure = describe(error)
            continue
        fed += 1
        if pictures:
            check_pixels(pictures[0].width, pictures[0].height, limits)
            return pictures[0], None if failure or packet is None else Warm(fed, pictures)
    raise ClipError(
        "no_pictures",
        f"none of {len(packets.pts)} packets could be decoded: {failure or 'the decoder gave no picture'}",
    )


def clip_info(video: Video, packets: Packets, first: VideoFrame) -> ClipInfo:
    """Facts about a file, given its first picture."""
    color, orientation = color_of(first), orientation_of(first)
    width, height = display_size(first.width, first.height, sar=video.sar, orientation=orientation)
    timeline = packets.timeline
    return ClipInfo(
        codec=video.codec,
        container=video.container_name,
        pixel_format=first.format.name,
        width=first.width,
        height=first.height,
        display_width=width,
        display_height=height,
        sar=f"{video.sar.numerator}:{video.sar.denominator}",
        rotation=orientation.rotation,
        fps=timeline.fps,
        duration_s=timeline.duration_s,
        num_pictures=len(timeline.pts),
        num_key_pictures=sum(timeline.keys),
        color_matrix=color.matrix,
        color_range=color.range,
        color_rule=color.rule,
        color_transfer=color.transfer,
        interlaced=first.interlaced_frame,
        alpha=any(component.is_alpha for component in first.format.components),
        file_bytes=video.file_bytes,
        variable_rate=len(timeline.pts) > 1 and timeline.grid is None,
    )
