"""Whole decodes against pictures that carry their number, and against a plain decode of every picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from pipeline import packets
from pipeline.clip import ClipRecord
from pipeline.decode import decode_clip
from pipeline.media import LastMedia
from pipeline.pictures import Outcome, PictureDecoder
from schemas.config import (
    BucketConfig,
    DecodeConfig,
    FramesConfig,
    LimitsConfig,
    PictureConfig,
    ResizeConfig,
)
from schemas.errors import ClipError, RunError
from tests.videos import draw, make_video, read_number

Result = tuple[np.ndarray, int, ClipRecord]


def decode(
    path: Path,
    *,
    num_frames: int = 13,
    size: tuple[int, int] = (96, 64),
    start_s: float | None = None,
    end_s: float | None = None,
    limits: LimitsConfig | None = None,
    resize: str = "cover_crop",
    clip: int = 0,
    threads: int = 1,
    deinterlace: str = "bwdif",
    last: LastMedia | None = None,
    **frames: Any,
) -> Result:
    return decode_clip(
        path,
        start_s=start_s,
        end_s=end_s,
        frames=FramesConfig.model_validate(frames),
        buckets=[BucketConfig(num_frames=num_frames, height=size[1], width=size[0])],
        resize=ResizeConfig.model_validate({"mode": resize}),
        limits=limits or LimitsConfig(),
        clip=clip,
        decode=DecodeConfig(threads=threads),
        picture=PictureConfig.model_validate({"deinterlace": deinterlace}),
        last=last,
    )


def numbers(result: Result) -> list[int]:
    return [read_number(picture) for picture in result[0]]


def plainly(path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Result:
    """The same clip by decoding every picture in order."""
    with monkeypatch.context() as patched:
        patched.setattr(PictureDecoder, "planned", lambda *_: Outcome(doubt="not tried"))
        result = decode(path, **settings)
    assert "decoded in order: not tried" in result[2].notes
    return result


CONTAINERS = [
    ("libx264", "mp4", 3),
    ("libx264", "mkv", 0),
    ("libx264", "flv", 2),
    ("libx264", "ts", 2),
    ("libx264", "avi", 2),  # its timestamps are in decode order, and wrong
    ("libx264", "h264", 2),  # it has none
    ("libx265", "mp4", 3),
    ("libvpx", "webm", 0),
    ("libvpx-vp9", "webm", 0),
    ("libsvtav1", "mp4", 0),
    ("mpeg4", "avi", 2),
    ("mpeg2video", "ts", 2),
    ("mpeg2video", "mpg", 2),
    ("mjpeg", "avi", 0),
    ("gif", "gif", 0),
    ("ffv1", "mkv", 0),
    ("prores_ks", "mov", 0),
]


@pytest.mark.parametrize(
    ("codec", "suffix", "bframes"), CONTAINERS, ids=[f"{c}-{s}" for c, s, _ in CONTAINERS]
)
def test_every_codec_gives_the_right_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, suffix: str, bframes: int
) -> None:
    path = make_video(tmp_path / f"a.{suffix}", codec=codec, num_frames=60, gop=15, bframes=bframes)
    for num_frames in (1, 13, 59, 60):
        result = decode(path, num_frames=num_frames)
        assert numbers(result) == [i * 60 // num_frames for i in range(num_frames)]
        assert result[2].num_pictures == 60
        np.testing.assert_array_equal(result[0], plainly(path, monkeypatch, num_frames=num_frames)[0])
    result = decode(path, num_frames=5, policy="fps", target_fps=12.0, start_s=1.0)
    assert numbers(result) == [24, 26, 28, 30, 32]
    assert result[2].pts_s == pytest.approx([1 + i / 12 for i in range(5)], abs=5e-3)
    assert result[2].effective_fps == 12.0
    assert result[2].coverage == pytest.approx(5 * 2 / 36, rel=0.01)


def test_the_plan_decodes_a_fraction_of_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=200, gop=10, bframes=2)
    fed: list[int] = []
    read = packets.Packets.read

    def counted(self: packets.Packets, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Any]]:
        for i, packet in read(self, spans):
            fed.append(i)
            yield i, packet

    monkeypatch.setattr(packets.Packets, "read", counted)
    assert numbers(decode(path, num_frames=5)) == [0, 40, 80, 120, 160]
    assert len(fed) < 15  # a key frame each, and what shows the first picture
    fed.clear()
    assert numbers(decode(path, num_frames=5, policy="fps", target_fps=24.0)) == [0, 1, 2, 3, 4]
    assert len(fed) < 20


def test_a_varying_rate_is_sampled_in_time(tmp_path: Path) -> None:
    pts = [100 * i for i in range(10)] + [900 + 1000 * i for i in range(1, 11)]
    path = make_video(tmp_path / "a.mkv", fps=10, num_frames=20, pts=pts)
    result = decode(path, num_frames=11, policy="fps", target_fps=1.0)
    assert numbers(result) == [0, *range(9, 19)]
    uniform = decode(path, num_frames=12)
    shown = [max(t for t in pts if t <= i * 1000 * 11 / 12) for i in range(12)]
    assert [round(t * 1000) for t in uniform[2].pts_s] == pytest.approx(shown, abs=2)


def test_windows_select_by_time(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", fps=10, num_frames=100, gop=30)
    result = decode(path, num_frames=5, start_s=2.0, end_s=3.0)
    assert numbers(result) == [20, 22, 24, 26, 28]
    assert result[2].pts_s == [2.0, 2.2, 2.4, 2.6, 2.8]
    assert (result[2].num_pictures, result[2].duration_s) == (10, 1.0)
    with pytest.raises(ClipError) as caught:
        decode(path, start_s=10.0, end_s=12.0)
    assert caught.value.reason == "empty_window"


def test_short_clips_by_rule(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", fps=10, num_frames=4)
    repeated = decode(path, num_frames=6, short="repeat_last")
    assert numbers(repeated) == [0, 1, 2, 3, 3, 3]
    assert repeated[2].duplicated == [4, 5]
    with pytest.raises(ClipError) as caught:
        decode(path, num_frames=6, short="drop")
    assert caught.value.reason == "too_short"
    with pytest.raises(RunError, match="6 frames are wanted"):
        decode(path, num_frames=6, short="error")


def test_blends_lie_between_their_pictures(tmp_path: Path) -> None:
    pictures = [np.full((64, 96, 3), 40 + 20 * i, np.uint8) for i in range(5)]
    path = make_video(tmp_path / "a.mkv", codec="ffv1", fps=10, pictures=pictures, pix_fmt="yuv444p")
    frames, _, record = decode(path, num_frames=9)
    assert record.interpolated == [1, 3, 5, 7]
    assert record.pts_s == pytest.approx([i * 0.05 for i in range(9)], abs=1e-3)
    levels = frames.astype(float).mean((1, 2, 3))
    assert levels == pytest.approx([40 + 10 * i for i in range(9)], abs=1.5)
    assert record.coverage == 1.0


def test_blending_stops_at_a_hard_cut(tmp_path: Path) -> None:
    levels = [40, 42, 44, 46, 200, 202, 204, 206]
    pictures = [np.full((64, 96, 3), level, np.uint8) for level in levels]
    path = make_video(tmp_path / "a.mkv", codec="ffv1", fps=10, pictures=pictures, pix_fmt="yuv444p")
    frames, _, record = decode(path, num_frames=29)
    assert not [value for value in frames.astype(float).mean((1, 2, 3)) if 50 < value < 195]
    assert record.interpolated
    assert all(record.pts_s[i] < 0.3 or record.pts_s[i] > 0.4 for i in record.interpolated)


def test_one_picture_fills_a_clip(tmp_path: Path) -> None:
    frames, _, record = decode(make_video(tmp_path / "a.mp4", num_frames=1), num_frames=5)
    assert (frames == frames[0]).all()
    assert record.duplicated == [1, 2, 3, 4]
    assert record.interpolated == []


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_and_sample_aspect_ratio_are_applied(tmp_path: Path, rotation: int) -> None:
    upright = draw(0b10110010, width=96, height=64)
    coded = np.ascontiguousarray(np.rot90(upright, -rotation // 90))
    wide = coded.shape[1] // 2
    squeezed = np.ascontiguousarray(coded[:, ::2])
    path = make_video(
        tmp_path / "a.mp4",
        size=(wide, coded.shape[0]),
        pictures=[squeezed] * 3,
        rotation=rotation,
        sar=Fraction(2),
    )
    frames, _, record = decode(path, num_frames=3)
    assert [read_number(picture) for picture in frames] == [0b10110010] * 3
    assert np.abs(frames[0].astype(int) - upright).mean() < 12
    assert record.sar == "2:1"
    assert record.rotation == (360 - rotation) % 360


def test_the_bucket_follows_shape_and_length(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", size=(96, 64), num_frames=20, rotation=90)
    shapes = [(17, 64, 96), (17, 96, 64), (9, 96, 64), (25, 96, 64)]
    buckets = [BucketConfig(num_frames=f, height=h, width=w) for f, h, w in shapes]
    frames, position, _ = decode_clip(
        path, frames=FramesConfig(), buckets=buckets, resize=ResizeConfig(), limits=LimitsConfig()
    )
    assert position == 1
    assert frames.shape == (17, 96, 64, 3)


def damage(path: Path, keep: int, pattern: bytes = b"\xff") -> None:
    """Overwrite the payload of every picture from `keep` on, in decode order, up to the next key frame."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for i, packet in enumerate(p for p in container.demux(video=0) if p.size):
            if i > keep and packet.is_keyframe:
                break
            if i >= keep:
                at = data.find(bytes(packet), packet.pos)  # equal pictures have equal packets
                assert at >= 0
                data[at : at + packet.size] = pattern * packet.size
    path.write_bytes(data)


def test_a_little_damage_is_repaired_and_recorded(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", num_frames=60, gop=10)
    damage(path, 38)  # pictures 38 and 39
    result = decode(path, num_frames=30)
    assert result[2].repaired == [19]
    assert numbers(result) == [37 if i == 19 else 2 * i for i in range(30)]
    assert result[2].pts_s[19] == pytest.approx(37 / 24, abs=2e-3)
    assert result[2].notes[0].startswith("decoded in order: ")


def test_too_much_damage_is_refused(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", num_frames=60, gop=20)
    damage(path, 25)
    with pytest.raises(ClipError, match=r"7 of 30 wanted pictures .* limits.max_damage = 0\.1") as caught:
        decode(path, num_frames=30)
    assert caught.value.reason == "damaged"
    lenient = decode(path, num_frames=30, limits=LimitsConfig(max_damage=0.5))
    assert lenient[2].repaired == list(range(13, 20))
    assert numbers(lenient)[12:21] == [24, 24, 24, 24, 24, 40, 40, 40, 40]
    undamaged_part = decode(path, num_frames=10, end_s=0.8)
    assert undamaged_part[2].repaired == []


def test_pictures_a_stream_never_shows_are_left_out(tmp_path: Path) -> None:
    # A transport stream cut inside a group: its first packets refer to pictures that are gone.
    whole = make_video(tmp_path / "a.ts", codec="mpeg2video", num_frames=60, gop=12, bframes=2)
    data = whole.read_bytes()
    path = tmp_path / "cut.ts"
    path.write_bytes(data[len(data) // 188 // 6 * 188 :])
    frames, _, record = decode(path, num_frames=9)
    found = [read_number(picture) for picture in frames]
    assert found[0] >= 2
    assert record.num_pictures < 60
    assert found == [found[0] + i * record.num_pictures // 9 for i in range(9)]


def test_a_picture_over_the_limit_in_mid_stream_is_refused(tmp_path: Path) -> None:
    small = make_video(tmp_path / "a.h264", num_frames=10)
    large = make_video(tmp_path / "b.h264", num_frames=10, size=(192, 128))
    small.write_bytes(small.read_bytes() + large.read_bytes())
    assert numbers(decode(small, num_frames=20)) == [*range(10)] * 2
    with pytest.raises(ClipError) as caught:
        decode(small, num_frames=20, limits=LimitsConfig(max_pixels=100 * 100))
    assert caught.value.reason == "limit_pixels"


def test_frames_go_into_a_given_buffer(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=8)
    buffer = np.zeros(10 * 64 * 96 * 3, np.uint8)
    frames, _, _ = decode_clip(
        path,
        frames=FramesConfig(),
        buckets=[BucketConfig(num_frames=9, height=64, width=96)],
        resize=ResizeConfig(),
        limits=LimitsConfig(),
        buffer=buffer,
    )
    assert np.shares_memory(frames, buffer)
    np.testing.assert_array_equal(frames, decode(path, num_frames=9)[0])


def test_alpha_is_decoded(tmp_path: Path) -> None:
    rgba = np.full((64, 96, 4), 255, np.uint8)
    rgba[:, 48:, 3] = 0
    pictures = [VideoFrame.from_ndarray(rgba, "rgba").reformat(format="yuva420p") for _ in range(4)]
    path = make_video(tmp_path / "a.webm", codec="libvpx-vp9", pictures=pictures, pix_fmt="yuva420p")
    frames, _, record = decode(path, num_frames=4)
    assert record.notes == ["alpha: composited over RGB (0, 0, 0)"]
    assert frames[:, :, :40].min() > 240
    assert frames[:, :, 56:].max() < 15


def test_the_clips_of_a_row_lie_side_by_side(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=60, gop=10)
    chunks = [
        decode(path, num_frames=9, policy="fps", target_fps=12.0, clips="chunk", clip=clip)
        for clip in range(3)
    ]
    assert [numbers(chunk) for chunk in chunks] == [
        [18 * clip + 2 * i for i in range(9)] for clip in range(3)
    ]
    assert [chunk[2].clip for chunk in chunks] == [0, 1, 2]


def test_the_record_is_plain_values(tmp_path: Path) -> None:
    _, _, record = decode(make_video(tmp_path / "a.mp4", num_frames=8), num_frames=9)
    plain = asdict(record)
    assert ClipRecord(**plain) == record
    for value in plain.values():
        items = value if isinstance(value, list) else [value]
        assert {type(item) for item in items} <= {str, int, float, bool}


@pytest.mark.parametrize("keep_bytes", [2**20, 0])
@pytest.mark.parametrize("bframes", [0, 2])
def test_joined_recordings_follow_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bframes: int, keep_bytes: int
) -> None:
    monkeypatch.setattr("pipeline.packets.KEEP_BYTES", keep_bytes)
    made: dict[str, Any] = {"fps": 25, "gop": 12, "bframes": bframes}
    first = make_video(tmp_path / "a.ts", num_frames=30, **made)
    pictures = [draw(100 + i, width=96, height=64) for i in range(30)]
    second = make_video(tmp_path / "b.ts", pictures=pictures, **made)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    result = decode(joined, num_frames=60)
    assert numbers(result) == [*range(30), *range(100, 130)]
    assert result[2].num_pictures == 60
    assert result[2].pts_s == pytest.approx([i / 25 for i in range(60)], abs=1e-4)
    assert result[2].notes == ["its times go back once: the parts are taken one after the other"]
    assert numbers(decode(joined, num_frames=5, start_s=1.0, end_s=1.4)) == [25, 27, 29, 101, 103]


def test_pictures_that_share_a_time_are_all_there(tmp_path: Path) -> None:
    # Tiny pictures in a program stream: several to a packet of the container, times made up by the demuxer.
    path = make_video(tmp_path / "a.mpg", codec="mpeg2video", num_frames=97, gop=8, bframes=3)
    assert numbers(decode(path, num_frames=97)) == list(range(97))
    assert numbers(decode(path, num_frames=13, policy="fps", target_fps=24.0)) == list(range(13))


def test_a_long_hole_is_told(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", num_frames=20, pts=[100 * i + 5000 * (i > 9) for i in range(20)])
    (note,) = decode(path, num_frames=13)[2].notes
    assert note == "no new picture for 2.1 s after 0.4 s"


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("bikes.mp4", []),
        ("edts.mp4", []),
        ("cursed-vfr.mp4", ["no new picture for 1.6 s after 5.6 s"]),
        ("roadtrip-vp92-10bit.webm", []),
        ("bear-vp9-odd-dimensions.webm", []),
        ("derived_bikes_xvid.avi", []),
        ("derived_cups_odd_853x479_444.mp4", []),
        ("sample_vvc.mp4", []),
        (
            "test_res_change.h264",
            [
                "decoded in order: its packets do not say when their pictures are shown",
                "the picture size changes: 848x464, 424x232",
            ],
        ),
        (
            "derived_cut_mid_gop.ts",
            [
                "decoded in order: the decoder flags damaged pictures",
                "4 of 15 packets show no picture",
                "11 pictures stretched over 49 frames, 4.5 times slower",
            ],
        ),
        ("-video-with-dash-.mp4", ["5 pictures stretched over 49 frames, 9.8 times slower"]),
    ],
)
def test_real_clips_give_what_a_plain_decode_gives(
    clips_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, notes: list[str]
) -> None:
    found = decode(clips_dir / name, num_frames=49, size=(144, 96))
    plain = plainly(clips_dir / name, monkeypatch, num_frames=49, size=(144, 96))
    np.testing.assert_array_equal(found[0], plain[0])
    assert found[2].pts_s == plain[2].pts_s
    assert found[2].notes == notes


@pytest.mark.parametrize("name", ["corrupted.mp4", "derived_friday_bitrot.mp4"])
def test_real_damage_is_refused(clips_dir: Path, name: str) -> None:
    with pytest.raises(ClipError) as caught:
        decode(clips_dir / name, num_frames=49)
    assert caught.value.reason == "damaged"
