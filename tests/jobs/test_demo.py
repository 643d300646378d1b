"""The demo's clips are what their manifest says, quirks included."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from jobs.demo import CLIPS, DemoClip, make_demo, write_clip
from schemas.manifest import ManifestRow, read_manifest, split_rows


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"))


def clip_of(file: str) -> DemoClip:
    return next(clip for clip in CLIPS if clip.file == file)


def pictures(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def times(frames: list[av.VideoFrame]) -> list[float]:
    return [frame.time for frame in frames if frame.time is not None]


def test_every_row_of_the_manifest_is_usable(demo: Path) -> None:
    rows, problems = split_rows(read_manifest(demo))
    assert not problems
    assert [row.caption for row in rows] == [clip.caption for clip in CLIPS]
    assert all(isinstance(row, ManifestRow) and row.extra["quirk"] for row in rows)


@pytest.mark.parametrize("clip", [clip for clip in CLIPS if not clip.truncated], ids=lambda clip: clip.file)
def test_a_clip_has_the_rate_and_length_it_claims(demo: Path, clip: DemoClip) -> None:
    path = demo.parent / "clips" / clip.file
    shown = times(pictures(path))
    step = float(1 / clip.fps)
    assert shown[-1] - shown[0] == pytest.approx(clip.seconds - step, abs=2.5 * step)
    if not clip.variable_rate:
        assert len(shown) == round(clip.seconds * clip.fps)
        assert np.diff(shown) == pytest.approx(step, abs=2e-3)  # Matroska rounds to milliseconds


def test_kinds_are_as_mixed_as_they_should_be(demo: Path) -> None:
    codecs, suffixes = set(), set()
    for clip in CLIPS:
        if not clip.truncated:
            with av.open(str(demo.parent / "clips" / clip.file)) as container:
                codecs.add(container.streams.video[0].codec_context.codec.canonical_name)
        suffixes.add(Path(clip.file).suffix)
    assert codecs == {"h264", "hevc", "vp8", "vp9", "av1", "mpeg2video", "mpeg4", "mjpeg", "gif"}
    assert suffixes == {".mp4", ".mkv", ".webm", ".avi", ".mov", ".ts", ".gif"}
    assert {Fraction(12), Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(60)} <= {
        clip.fps for clip in CLIPS
    }


def test_the_variable_rate_clip_changes_its_rate(demo: Path) -> None:
    steps = np.diff(times(pictures(demo.parent / "clips" / "hot_air_balloon.mp4")))
    assert steps[:50] == pytest.approx(1 / 30, abs=1e-4)
    assert steps[-10:] == pytest.approx(3 / 30, abs=1e-4)


def test_the_rotated_clip_is_upright_after_its_rotation(demo: Path) -> None:
    clip = clip_of("rocket.mp4")
    frame = pictures(demo.parent / "clips" / clip.file)[0]
    assert (frame.width, frame.height, frame.rotation) == (640, 360, 90)
    upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90).astype(int)
    drawn = np.asarray(clip.scene(0.0, *clip.size)).astype(int)
    assert np.abs(upright - drawn).mean() < 4
    assert np.abs(upright[::-1] - drawn).mean() > 20


def test_the_wide_pixels_make_the_displayed_shape(demo: Path) -> None:
    with av.open(str(demo.parent / "clips" / "fish_tank.ts")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.sample_aspect_ratio) == (720, 480, Fraction(32, 27))


def test_the_short_clip_is_odd_and_full_range(demo: Path) -> None:
    clip = clip_of("sunrise.mkv")
    frames = pictures(demo.parent / "clips" / clip.file)
    assert len(frames) == 20
    assert (frames[0].width, frames[0].height) == (427, 241)
    assert (frames[0].color_range, frames[0].colorspace) == (ColorRange.JPEG, Colorspace.ITU709)
    shown = frames[0].reformat(format="rgb24", src_colorspace=Colorspace.ITU709).to_ndarray().astype(int)
    assert np.abs(shown - np.asarray(clip.scene(0.0, *clip.size)).astype(int)).mean() < 3


def test_the_broken_clip_cannot_be_opened(demo: Path) -> None:
    with pytest.raises(av.error.InvalidDataError):
        av.open(str(demo.parent / "clips" / "cut_short.mp4"))


@pytest.mark.parametrize("file", ["sailing_boat.mkv", "kite.webm", "sunrise.mkv"])
def test_writing_a_clip_again_gives_the_same_bytes(demo: Path, tmp_path: Path, file: str) -> None:
    again = write_clip(clip_of(file), tmp_path)
    assert again.read_bytes() == (demo.parent / "clips" / file).read_bytes()
