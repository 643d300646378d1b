"""Packets that were not kept: read again for about their own bytes, and the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import packets, reread
from tests.pipeline.test_decode import CONTAINERS, decode
from tests.videos import draw, make_video

SEEKABLE = [c for c in CONTAINERS if c[1] not in ("h264", "gif")]


@pytest.mark.parametrize(("codec", "suffix", "bframes"), SEEKABLE, ids=[f"{c}-{s}" for c, s, _ in SEEKABLE])
def test_payloads_that_are_not_kept_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, suffix: str, bframes: int
) -> None:
    # Program streams tell the place of a picture only where it is large enough to begin a packet of theirs.
    width, height = (320, 240) if suffix == "mpg" else (96, 64)
    noise = np.random.default_rng(0).integers(-24, 24, (50, height, width, 1))
    drawn = [draw(i, width=width, height=height) + noise[i] for i in range(50)]
    pictures = [np.clip(picture, 0, 255).astype(np.uint8) for picture in drawn] * 3
    path = make_video(
        tmp_path / f"a.{suffix}",
        codec=codec,
        size=(width, height),
        pictures=pictures,
        gop=10,
        bframes=bframes,
        options={"q:v": "12"} if codec == "mpeg2video" else None,
    )
    kept = decode(path, num_frames=5, start_s=0.2)
    monkeypatch.setattr(packets, "KEEP_BYTES", 0)
    near = decode(path, num_frames=5, start_s=0.2)
    monkeypatch.setattr(reread, "NEAR_BYTES", 0)
    read = count_payloads(monkeypatch)
    far = decode(path, num_frames=5, start_s=0.2)
    for again in (near, far):
        np.testing.assert_array_equal(again[0], kept[0])
        assert again[2] == kept[2]
    if "decoded in order" not in "".join(kept[2].notes):
        assert len(read) < 130


def count_payloads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every packet that is read again."""
    read: list[int] = []
    payloads = reread._payloads

    def counted(*opened: Any) -> Iterator[Any]:
        for packet in payloads(*opened):
            read.append(packet.size)
            yield packet

    monkeypatch.setattr(reread, "_payloads", counted)
    return read


@pytest.mark.parametrize("failure", ["late", "lost", "refused"])
def test_a_seek_that_fails_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=60, gop=10, bframes=2)
    kept = decode(path, num_frames=4)
    monkeypatch.setattr(packets, "KEEP_BYTES", 0)
    monkeypatch.setattr(reread, "NEAR_BYTES", 0)
    if failure == "lost":
        names = itertools.count()
        monkeypatch.setattr(reread, "_name", lambda *_: (next(names),))
    else:
        target = 29000 if failure == "late" else -(2**63)
        monkeypatch.setattr(reread.Rereader, "_targets", lambda *_: iter([target]))
    again = decode(path, num_frames=4)
    np.testing.assert_array_equal(again[0], kept[0])
    assert again[2] == kept[2]
