"""Packets whose pictures nobody sees: told from their first bytes, and left out before frames are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline.hidden import shows
from tests.pipeline.test_decode import decode
from tests.videos import draw, make_video


@pytest.mark.parametrize(
    ("codec", "data", "shown"),
    [
        ("vp8", b"\x10\x00", True),
        ("vp8", b"\x01\x00", False),
        ("vp9", b"\x82\x00", True),  # a key picture
        ("vp9", b"\x86\x00", True),  # another one
        ("vp9", b"\x84\x00", False),
        ("vp9", b"\x88\x00", True),  # shows one that is there already
        ("vp9", b"\xb1\x00", True),  # profile 3
        ("vp9", b"\xb2\x00", False),
        ("vp9", b"\x84\x00\x86\x00\x00\xc1\x02\x03\xc1", True),  # a hidden one and a shown one
        ("vp9", b"\x84\x00\x84\x00\x00\xc1\x02\x03\xc1", False),
        ("h264", b"\x00", True),
    ],
)
def test_the_first_bytes_tell(codec: str, data: bytes, shown: bool) -> None:
    assert shows(codec, memoryview(data)) is shown


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_as_many_packets_show_as_pictures_come_out(tmp_path: Path, codec: str) -> None:
    options = {"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "12", "b:v": "200k", "crf": "30"}
    pictures = [np.roll(draw(i, width=96, height=64), i, axis=1) for i in range(40)]
    path = make_video(tmp_path / "a.webm", codec=codec, pictures=pictures, gop=40, options=options)
    with av.open(str(path)) as container:
        found = [packet for packet in container.demux(video=0) if packet.size]
        name = container.streams.video[0].codec_context.codec.canonical_name
    assert sum(shows(name, memoryview(packet)) for packet in found) == 40


def test_chunks_end_to_end_are_the_sequence(clips_dir: Path) -> None:
    path = clips_dir / "roadtrip-vp92-10bit.webm"  # 80 packets, 72 pictures
    settings: dict[str, Any] = {"policy": "contiguous", "target_fps": 24.0}
    whole, _, record = decode(path, num_frames=72, **settings)
    assert (record.num_pictures, record.notes, record.interpolated) == (72, [], [])
    parts = [decode(path, num_frames=9, clip=clip, clips="chunk", **settings) for clip in range(8)]
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), whole)
    assert [pts for part in parts for pts in part[2].pts_s] == record.pts_s
