"""What will become of a row: as `decode_clip` then does it, and with `full`, what a whole decode finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.clip import Decoded, Placed
from pipeline.decode import decode_clip
from pipeline.normalize import Normalizer
from pipeline.placement import place_clip
from schemas.config import BucketConfig, FramesConfig, LimitsConfig, PictureConfig, ResizeConfig
from schemas.errors import ClipError
from tests.pipeline.test_decode import damage
from tests.videos import make_video, read_number

BUCKETS = [
    BucketConfig(num_frames=num_frames, height=height, width=width)
    for num_frames in (9, 17)
    for height, width in ((64, 96), (96, 64))
]


def place(
    path: Path,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    full: bool = False,
    limits: LimitsConfig | None = None,
    hdr: str = "tonemap",
    **frames: Any,
) -> Placed:
    return place_clip(
        path,
        start_s=start_s,
        end_s=end_s,
        frames=FramesConfig.model_validate(frames),
        buckets=BUCKETS,
        picture=PictureConfig.model_validate({"hdr": hdr}),
        limits=limits or LimitsConfig(),
        full=full,
    )


def reason(path: Path, **settings: Any) -> str:
    with pytest.raises(ClipError) as caught:
        place(path, **settings)
    assert caught.value.stage == "decode"
    return caught.value.reason


@pytest.mark.parametrize(
    ("window", "frames"),
    [
        ({}, {}),
        ({"start_s": 1.0}, {"short": "nearest"}),
        ({"start_s": 1.0, "end_s": 1.1}, {}),
        ({"end_s": 0.7}, {"policy": "fps", "target_fps": 24.0, "clips": "chunk"}),
        ({}, {"policy": "keyframe"}),
    ],
)
def test_it_tells_what_a_decode_does(tmp_path: Path, window: dict[str, Any], frames: dict[str, Any]) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=36, rotation=90)
    for full in (False, True):
        placed = place(path, **window, **frames, full=full)
        _, bucket, record = decode_clip(
            path,
            **window,
            frames=FramesConfig.model_validate(frames),
            buckets=BUCKETS,
            resize=ResizeConfig(),
            limits=LimitsConfig(),
        )
        assert (placed.bucket, placed.notes) == (bucket, record.notes)
        assert placed.info.num_pictures == 36
        assert placed.num_available == record.num_pictures
        assert placed.decoded == (Decoded(record.num_pictures, 0, 0) if full else None)


def test_a_row_makes_as_many_clips_as_fit(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=36)
    slide: dict[str, Any] = {"policy": "fps", "target_fps": 24.0, "clips": "slide", "slide_step": 4}
    assert place(path, **slide).num_clips == (36 - 17) // 4 + 1
    assert place(path, **slide, end_s=0.5).num_clips == 1
    assert place(path).num_clips == 1


@pytest.mark.parametrize(
    ("end_s", "position", "num_frames", "filled"),
    [(1.5, 0, 33, 0), (1.3, 0, 25, 0), (1.0, 0, 17, 0), (0.7, 2, 17, 0), (0.6, 2, 9, 0), (0.25, 2, 9, 3)],
)
def test_a_whole_clip_is_as_long_as_its_row_and_the_rules_allow(
    tmp_path: Path, end_s: float, position: int, num_frames: int, filled: int
) -> None:
    """Of 36, 32, 24, 17, 15 and 6 pictures; counts of 8n + 1 from 9 to 33 are allowed."""
    path = make_video(tmp_path / "a.mp4", num_frames=36)
    lengths = [(9, 17, 25, 33), (9, 17), (9, 17), (9, 17)]
    buckets = [BUCKETS[0].model_copy(update={"num_frames": 33}), *BUCKETS[1:]]
    settings: dict[str, Any] = {
        "end_s": end_s,
        "frames": FramesConfig(policy="contiguous", target_fps=24.0, clips="whole", short="repeat_last"),
        "buckets": buckets,
        "lengths": lengths,
        "limits": LimitsConfig(),
    }
    placed = place_clip(path, **settings)
    buffer = np.zeros(33 * 64 * 96 * 3, np.uint8)
    frames, bucket, record = decode_clip(path, **settings, resize=ResizeConfig(), buffer=buffer)
    assert (placed.num_frames, placed.num_clips) == (num_frames, 1)
    assert placed.bucket == bucket == position
    assert frames.shape == (num_frames, 64, 96, 3)
    assert np.shares_memory(frames, buffer)
    assert len(record.pts_s) == len(record.frame_weights) == num_frames
    assert len(record.duplicated) == filled
    pictures = [read_number(picture) for picture in frames]
    assert pictures == [min(i, placed.num_available - 1) for i in range(num_frames)]
    assert record.coverage == pytest.approx(min(1.0, num_frames / 24 / end_s), abs=1e-4)


def test_it_refuses_what_a_decode_refuses(tmp_path: Path, clips_dir: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=5)
    assert reason(path, start_s=7.0) == "empty_window"
    for short in ("drop", "error"):
        assert reason(path, short=short) == "too_short"
    assert reason(clips_dir / "hdr10-av1.mp4", hdr="quarantine") == "hdr"
    assert reason(path.with_name("b.mp4")) == "open_failed"


def test_a_full_check_counts_the_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Normalizer, "convert", None)  # nothing is converted
    path = make_video(tmp_path / "a.mkv", num_frames=60, gop=20)
    damage(path, 36)
    assert place(path).decoded is None
    assert place(path, full=True).decoded == Decoded(56, 4, 0)
    assert place(path, full=True, end_s=1.0).decoded == Decoded(24, 0, 0)
    strict = LimitsConfig(max_damage=0.05)
    assert reason(path, full=True, limits=strict) == "damaged"
    assert reason(path, full=True, start_s=1.5, end_s=1.6) == "damaged"
    lenient = LimitsConfig(max_damage=1.0)
    assert reason(path, full=True, start_s=1.51, end_s=1.6, limits=lenient) == "no_pictures"


def test_pictures_that_are_none_are_told_apart_from_damage(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.ts", codec="mpeg2video", num_frames=60, gop=12, bframes=2)
    data = whole.read_bytes()
    path = tmp_path / "cut.ts"
    path.write_bytes(data[len(data) // 188 // 6 * 188 :])
    placed = place(path, full=True, limits=LimitsConfig(max_damage=0.5))
    assert placed.decoded is not None
    assert placed.decoded.num_hidden > 0
    parts = (placed.decoded.num_pictures, placed.decoded.num_damaged, placed.decoded.num_hidden)
    assert sum(parts) == placed.info.num_pictures
    assert placed.num_available == parts[0] + parts[1]


def test_the_same_rules_hold_for_a_decode_and_a_full_check(clips_dir: Path) -> None:
    cut = place(clips_dir / "derived_cut_mid_gop.ts", full=True)
    assert cut.decoded == Decoded(num_pictures=10, num_damaged=1, num_hidden=4)
    assert reason(clips_dir / "corrupted.mp4", full=True) == "damaged"
    assert place(clips_dir / "edts.mp4", full=True).decoded == Decoded(225, 0, 0)
