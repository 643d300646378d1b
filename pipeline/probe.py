"""What is in a video file: its packets read once, its first picture decoded.

In: a path and limits. Out: a `ClipInfo`, or ClipError. The one picture is what a container cannot tell
reliably: that a decoder works, the pixel format, rotation and colour.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import av
from av.video.frame import VideoFrame

from pipeline.clip import ClipInfo
from pipeline.container import Video, check_pixels, describe, open_video
from pipeline.geometry import display_size, orientation_of
from pipeline.normalize import color_of
from pipeline.packets import Packets, read_packets
from schemas.config import LimitsConfig
from schemas.errors import ClipError


def probe(path: str | Path, *, limits: LimitsConfig) -> ClipInfo:
    """Facts about the file at `path`; ClipError where it could not become a clip."""
    with open_video(path, limits=limits) as video:
        packets = read_packets(video, limits=limits)
        first = first_picture(video, packets, limits=limits)
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
        )


def first_picture(video: Video, packets: Packets, *, limits: LimitsConfig) -> VideoFrame:
    """The first picture that decodes; leaves the decoder flushed. ClipError where there is none."""
    failure = "the decoder gave no picture"
    all_packets = (packet for _, packet in packets.read([(0, len(packets.pts) - 1)]))
    for packet in chain(all_packets, [None]):
        try:
            frames = video.decoder.decode(packet)
        except MemoryError as error:
            raise ClipError("limit_memory", f"no memory for a picture: {error}") from error
        except av.error.DecoderNotFoundError as error:
            raise ClipError("no_decoder", f"no decoder for this codec: {describe(error)}") from error
        except av.FFmpegError as error:
            failure = describe(error)
            continue
        if frames:
            check_pixels(frames[0].width, frames[0].height, limits)
            video.decoder.flush_buffers()
            return frames[0]
    raise ClipError("no_pictures", f"none of {len(packets.pts)} packets could be decoded: {failure}")
