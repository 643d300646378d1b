"""Every picture of a stretch: rebuilt lines and exact activity, equal to what a whole decode gives."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph
from av.video.frame import VideoFrame

from pipeline.clip import ClipRecord
from pipeline.deinterlace import Deinterlacer
from pipeline.normalize import Normalizer
from schemas.config import BucketConfig, PictureConfig, ResizeConfig
from tests.pipeline.test_decode import damage, decode, numbers
from tests.videos import draw, make_video


def fielded(number: int, *, interlaced: bool) -> VideoFrame:
    """A picture whose fields differ, flagged as interlaced or not."""
    picture = draw(number, width=96, height=64)
    picture[1::2] = np.roll(picture[1::2], 8, axis=1)
    frame = VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
    graph = Graph()
    source = graph.add_buffer(width=96, height=64, format=frame.format, time_base=Fraction(1, 24))
    flag = graph.add("setfield", "mode=tff" if interlaced else "mode=prog")
    graph.link_nodes(source, flag, graph.add("buffersink")).configure()
    graph.push(frame)
    flagged = graph.pull()
    assert isinstance(flagged, VideoFrame)
    return flagged


def rebuilt_in_sequence(path: Path, *, num_frames: int) -> list[np.ndarray]:
    """Frames evenly over a file whose every picture is decoded and deinterlaced in order."""
    with av.open(str(path)) as container:
        pictures = {frame.pts: frame for frame in container.decode(video=0) if frame.pts is not None}
    deinterlacer = Deinterlacer(sorted(pictures))
    ready = [pair for tick in sorted(pictures) for pair in deinterlacer.push(tick, pictures[tick])]
    ready += deinterlacer.flush()
    normalizer = Normalizer(
        BucketConfig(num_frames=num_frames, height=64, width=96),
        resize=ResizeConfig(),
        picture=PictureConfig(),
        sar=Fraction(1),
    )
    frames = [np.empty((64, 96, 3), np.uint8) for _ in range(num_frames)]
    for i, frame in enumerate(frames):
        normalizer.convert(ready[i * len(ready) // num_frames][1], frame)
    return frames


@pytest.mark.parametrize("progressive", [0, 7])
@pytest.mark.parametrize("num_frames", [5, 40])
def test_interlaced_pictures_are_rebuilt_as_in_a_whole_decode(
    tmp_path: Path, progressive: int, num_frames: int
) -> None:
    pictures = [fielded(i, interlaced=i >= progressive) for i in range(40)]
    path = make_video(
        tmp_path / "a.mkv",
        codec="mpeg2video",
        pictures=pictures,
        gop=9,
        bframes=2,
        options={"flags": "+ildct+ilme"},
    )
    frames, _, record = decode(path, num_frames=num_frames)
    np.testing.assert_array_equal(frames, rebuilt_in_sequence(path, num_frames=num_frames))
    assert record.interlaced
    assert record.notes == ["interlaced: lines rebuilt by bwdif"]
    assert num_frames == 40 or record.num_fed < 40
    woven, _, record = decode(path, num_frames=num_frames, deinterlace="off")
    assert record.interlaced
    assert (woven != frames).any()


def test_a_damaged_neighbour_is_no_damage(tmp_path: Path) -> None:
    options = {"x264-params": "scenecut=0:tff=1"}
    path = make_video(tmp_path / "a.mkv", num_frames=40, gop=8, options=options)
    damage(path, 23)  # the last of its group, just before a wanted one
    frames, _, record = decode(path, num_frames=5)
    assert numbers((frames, 0, record)) == [0, 8, 16, 24, 32]
    assert record.repaired == []
    assert record.notes[0].startswith("decoded in order")


def test_exact_activity_follows_what_moves(tmp_path: Path) -> None:
    # Noise makes packets as large in the still part as in the part that moves.
    rng = np.random.default_rng(0)
    pictures = []
    for i in range(60):
        picture = np.full((64, 96, 3), 128) + rng.integers(-2, 3, (64, 96, 1))
        x = 2 * (i - 20) if 20 <= i < 40 else 0 if i < 20 else 40
        picture[:, x : x + 40] += 100
        pictures.append(picture.astype(np.uint8))
    path = make_video(tmp_path / "a.mkv", pictures=pictures, gop=20, bframes=2)
    _, _, even = decode(path, num_frames=13)
    _, _, record = decode(path, num_frames=13, policy="keyframe", activity="exact", boost=3.0)

    def inside(record: ClipRecord) -> int:
        return sum(20 / 24 <= second < 40 / 24 for second in record.pts_s)

    assert inside(record) > inside(even)
    weights = dict(zip(record.pts_s, record.frame_weights, strict=True))
    assert min(w for t, w in weights.items() if 22 / 24 < t < 39 / 24) > max(
        w for t, w in weights.items() if t < 19 / 24
    )
    again = decode(path, num_frames=13, policy="keyframe", activity="exact", boost=0.0)
    assert again[2].pts_s == even.pts_s


def test_pictures_that_are_none_count_for_no_activity(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.ts", codec="mpeg2video", num_frames=60, gop=12, bframes=2)
    data = whole.read_bytes()
    path = tmp_path / "cut.ts"
    path.write_bytes(data[len(data) // 188 // 6 * 188 :])
    _, _, even = decode(path, num_frames=9)
    _, _, exact = decode(path, num_frames=9, policy="keyframe", activity="exact", boost=0.0)
    assert exact.pts_s == even.pts_s
    assert exact.num_pictures == even.num_pictures < 60
    assert set(even.notes) >= {note for note in exact.notes if "show no picture" in note} != set()
