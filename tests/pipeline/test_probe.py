"""Opening files: facts of good ones, a clear reason for every other one, and never a hang."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream

from pipeline import packets
from pipeline.clip import ClipInfo
from pipeline.media import open_media
from schemas.config import LimitsConfig
from schemas.errors import ClipError
from tests.videos import make_video

LIMITS = LimitsConfig()


def probe(path: Path | str, *, limits: LimitsConfig) -> ClipInfo:
    with open_media(path, limits=limits) as media:
        return media.info


def reason(path: Path, limits: LimitsConfig = LIMITS) -> str:
    with pytest.raises(ClipError) as caught:
        probe(path, limits=limits)
    assert caught.value.stage == "decode"
    assert caught.value.message
    return caught.value.reason


def test_the_facts_of_a_file(tmp_path: Path) -> None:
    path = make_video(
        tmp_path / "a.mp4",
        size=(64, 48),
        fps=25,
        num_frames=30,
        gop=10,
        bframes=2,
        rotation=90,
        sar=Fraction(3, 2),
    )
    assert probe(path, limits=LIMITS) == ClipInfo(
        codec="h264",
        container="mov",
        pixel_format="yuv420p",
        width=64,
        height=48,
        display_width=48,
        display_height=96,
        sar="3:2",
        rotation=270,
        fps=25.0,
        duration_s=1.2,
        num_pictures=30,
        num_key_pictures=3,
        color_matrix="bt601",
        color_range="limited",
        color_rule="untagged:bt601",
        color_transfer="unspecified",
        interlaced=False,
        alpha=False,
        file_bytes=path.stat().st_size,
    )


def test_a_varying_rate_is_measured(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", fps=10, num_frames=4, pts=[0, 100, 150, 400])
    info = probe(path, limits=LIMITS)
    assert info.num_pictures == 4
    assert info.duration_s == pytest.approx(0.4 + 0.1, abs=0.051)


def test_names_are_never_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-dash-.mp4", "concat:x.mp4", "pipe:0.mp4", "ünï côdé.mp4", "http:x.mp4"):
        make_video(tmp_path / "a.mp4", num_frames=3).rename(tmp_path / name)
        assert probe(name, limits=LIMITS).num_pictures == 3


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "socket", "nul"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, 0o140644)
    elif kind == "nul":
        path = tmp_path / "a\0.mp4"
    assert reason(path) == "open_failed"


def test_devices_are_not_opened() -> None:
    assert reason(Path("/dev/zero")) == "open_failed"


def test_empty_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"")
    assert reason(path) == "empty_file"
    path.write_bytes(b"<html>not a video</html>" * 50)
    assert reason(path) == "open_failed"


@pytest.mark.parametrize("suffix", ["m3u8", "ffconcat", "png", "sdp"])
def test_formats_that_name_other_files_are_refused(tmp_path: Path, suffix: str) -> None:
    target = make_video(tmp_path / "target.ts", codec="mpeg2video", num_frames=3)
    path = tmp_path / f"list.{suffix}"
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{target}\n#EXT-X-ENDLIST\n"
    path.write_text(
        {
            "m3u8": playlist,
            "ffconcat": f"ffconcat version 1.0\nfile {target}\n",
            "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"
            "a=rtpmap:96 H264/90000\n",
        }.get(suffix, "")
    )
    if suffix == "png":
        with av.open(str(path), "w", format="image2") as container:
            stream = container.add_stream("png", rate=1)
            assert isinstance(stream, av.VideoStream)
            stream.width = stream.height = 16
            stream.pix_fmt = "rgb24"
            container.mux(stream.encode(av.VideoFrame(16, 16, "rgb24")))
    assert reason(path) == "format_refused"


def test_audio_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        assert isinstance(stream, AudioStream)
        sound = AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 48000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    assert reason(path) == "no_video_stream"


def test_limits_name_their_config_key(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", fps=10, num_frames=30)
    for name, value in (("max_bytes", 100), ("max_pixels", 1000), ("max_seconds", 2.5), ("max_frames", 29)):
        limits = LIMITS.model_copy(update={name: value})
        assert reason(path, limits) == f"limit_{name.removeprefix('max_')}"
        with pytest.raises(ClipError, match=f"limits.{name} = {value}"):
            probe(path, limits=limits)
    exact = LIMITS.model_copy(update={"max_pixels": 96 * 64, "max_seconds": 3.0, "max_frames": 30})
    assert probe(path, limits=exact).num_pictures == 30


def test_a_file_cut_short_says_so(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.mp4", num_frames=30).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: len(whole) // 2])  # the index is at the end
    assert reason(path) == "open_failed"


def test_a_stream_without_a_decodable_picture(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", num_frames=5)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            at = data.find(bytes(packet)) if packet.size else -1
            if at >= 0:
                data[at : at + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    assert reason(path) == "no_pictures"


def test_packets_can_be_read_again_without_keeping_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=30)
    kept = probe(path, limits=LIMITS)
    monkeypatch.setattr(packets, "KEEP_BYTES", 1000)
    assert probe(path, limits=LIMITS) == kept


REAL = {
    "derived_empty.mp4": "empty_file",
    "derived_not_a_video.mp4": "open_failed",
    "derived_truncated_noMoovOrTail.mp4": "open_failed",
    "invalid-bitstream.webm": "no_pictures",
    "sample_audio_only.mp4": "no_video_stream",
    "sample_fragmented_sgpd_v2.mp4": "encrypted",
    "video_dovi_3840x2160_30fps_dav1_10.mp4": "no_decoder",
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_that_cannot_be_clips(clips_dir: Path, name: str) -> None:
    assert reason(clips_dir / name) == REAL[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("video_90.mov", {"rotation": 90, "display_width": 320, "display_height": 568}),
        ("sar_2x1.mp4", {"sar": "2:1", "display_width": 1280, "display_height": 360}),
        ("nasa_13013.mp4", {"width": 480, "height": 270, "num_pictures": 390}),  # the better of two streams
        ("newtonscradle.gif", {"codec": "gif", "color_rule": "rgb", "num_pictures": 36}),
        ("transparent.webm", {"codec": "vp9", "alpha": True}),
        ("bt709_full_range.mp4", {"color_matrix": "bt709", "color_range": "full", "color_rule": "tagged"}),
        ("derived_flower_480i_h264.mkv", {"interlaced": True, "sar": "32:27"}),
        ("video_desks.3gp", {"codec": "h263", "sar": "12:11"}),  # metadata in no known encoding
        ("hdr10-av1.mp4", {"color_transfer": "smpte2084", "color_matrix": "bt2020"}),
    ],
)
def test_real_files_tell_the_truth(clips_dir: Path, name: str, expected: dict[str, object]) -> None:
    info = probe(clips_dir / name, limits=LIMITS)
    assert {key: getattr(info, key) for key in expected} == expected
