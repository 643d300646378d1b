"""Every frame equals the picture that a plain decode of the whole file shows at that time, byte for byte.

The plain decode is `benchmarks.exactness.plain_decode`, which shares nothing with the packet plan but the
pixel arithmetic of one picture. LATENTPRESS_EXAMPLES asks for more drawn streams than the default.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from benchmarks.exactness import POLICIES, Verdict, check_clip, differences, plain_decode
from pipeline.clip import ClipRecord
from pipeline.decode import decode_clip
from pipeline.media import LastMedia
from schemas.config import BucketConfig, DecodeConfig, FramesConfig, LimitsConfig, ResizeConfig
from schemas.errors import ClipError
from tests.videos import draw, make_video

DEFAULT_EXAMPLES = 40
EXAMPLES = int(os.environ.get("LATENTPRESS_EXAMPLES", DEFAULT_EXAMPLES))
SIZE = (96, 64)
RESIZE = ResizeConfig()
FORMATS = [
    *(("libx264", suffix) for suffix in ("mp4", "mp4", "mp4", "mkv", "ts", "avi")),
    *(("libx265", suffix) for suffix in ("mp4", "mkv", "ts")),
    *(("mpeg2video", suffix) for suffix in ("ts", "mpg")),
    *(("mpeg4", suffix) for suffix in ("avi", "mp4")),
    *(("libvpx", "webm"), ("libvpx-vp9", "webm"), ("libvpx-vp9", "mp4"), ("mjpeg", "avi"), ("mjpeg", "mkv")),
]
REORDERING = ("libx264", "libx265", "mpeg4", "mpeg2video")
VARIABLE = ("mp4", "mkv", "webm", "ts")
"""Containers that hold any times."""
# Packets of a stream that refers to pictures before its start give no picture: no reason to refuse it.
MAY_REFUSE = {"too_short", "empty_window", "policy_error", "policy_refused"}


@dataclass(frozen=True)
class Stream:
    codec: str
    suffix: str
    num_pictures: int
    gop: int
    bframes: int
    pyramid: bool
    open_gop: bool
    hidden: int
    """Pictures before second zero: an edit list takes them out."""
    gaps: tuple[int, ...]
    """Hundredths of a picture's time from one picture to the next, in turn."""

    @property
    def timed(self) -> bool:
        return self.hidden > 0 or self.gaps != (100,)

    def write(self, path: Path) -> Path:
        pts = [0]
        while len(pts) < self.num_pictures:
            pts.append(pts[-1] + self.gaps[len(pts) % len(self.gaps)])
        x26 = f"b-pyramid={'normal' if self.codec == 'libx264' and self.pyramid else int(self.pyramid)}"
        x26 += f":open-gop={int(self.open_gop)}:b-adapt=0:rc-lookahead=8:scenecut=0:bframes={self.bframes}"
        options = {
            "libx264": {"preset": "veryfast", "crf": "24", "x264-params": x26 + ":ref=3"},
            "libx265": {"preset": "ultrafast", "crf": "24", "x265-params": x26 + ":log-level=none:pools=1"},
            "libvpx": {"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "8", "crf": "20", "b": "1M"},
            "libvpx-vp9": {"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "8", "crf": "20"},
        }.get(self.codec, {"q:v": "4"})
        noise = np.random.default_rng(0).integers(0, 80, (SIZE[1], SIZE[0], 3), np.uint8)
        pictures = [
            draw(i, width=SIZE[0], height=SIZE[1]) // 2 + np.roll(noise, (i, 2 * i), (0, 1))
            for i in range(self.num_pictures)
        ]
        return make_video(
            path,
            codec=self.codec,
            gop=self.gop,
            bframes=self.bframes,
            pts=[tick - pts[self.hidden] for tick in pts] if self.timed else None,
            pictures=pictures,
            options=options,
            container_options={"avoid_negative_ts": "disabled"} if self.hidden else None,
        )


@st.composite
def streams(data: st.DrawFn) -> Stream:
    codec, suffix = data(st.sampled_from(FORMATS))
    num_pictures = data(st.integers(1, 70))
    gaps = [100]
    if suffix in VARIABLE and codec in ("libx264", "libx265", "libvpx", "libvpx-vp9") and data(st.booleans()):
        gaps = data(st.lists(st.sampled_from([30, 100, 100, 101, 250, 1500]), min_size=1, max_size=5))
    return Stream(
        codec=codec,
        suffix=suffix,
        num_pictures=num_pictures,
        gop=data(st.integers(1, 60)),
        # A program stream times few of its packets, and a plain decode guesses the times of reordered ones.
        bframes=data(st.integers(0, 4)) if codec in REORDERING and suffix != "mpg" else 0,
        pyramid=data(st.booleans()),
        open_gop=data(st.booleans()),
        hidden=data(st.integers(0, min(30, num_pictures - 1))) if suffix == "mp4" else 0,
        gaps=tuple(gaps),
    )


@dataclass(frozen=True)
class Job:
    frames: FramesConfig
    clip: int
    window: tuple[float | None, float | None]
    num_frames: int

    def run(
        self, path: Path, *, threads: int = 1, last: LastMedia | None = None
    ) -> tuple[np.ndarray, ClipRecord] | str:
        """Frames and record, or the reason why there are none."""
        try:
            frames, _, record = decode_clip(
                path,
                start_s=self.window[0],
                end_s=self.window[1],
                clip=self.clip,
                frames=self.frames,
                buckets=[BucketConfig(num_frames=self.num_frames, height=SIZE[1], width=SIZE[0])],
                resize=RESIZE,
                decode=DecodeConfig(threads=threads),
                limits=LimitsConfig(),
                last=last,
            )
        except ClipError as error:
            return error.reason
        return frames, record


def facts(record: ClipRecord) -> ClipRecord:
    """The record without how it was decoded: a second thread may be some pictures ahead."""
    return replace(record, num_fed=0, notes=[n for n in record.notes if not n.startswith("decoded in order")])


@st.composite
def drawn_jobs(data: st.DrawFn) -> Job:
    """Any policy, clip of the row and time window."""
    given, clip = POLICIES[data(st.sampled_from(list(POLICIES)))]
    changes: dict[str, Any] = {}
    if given.policy == "keyframe":
        changes["boost"] = data(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    if given.policy in ("fps", "contiguous"):
        changes["target_fps"] = data(st.sampled_from([1.0, 7.5, 12.0, 29.97, 50.0]))
    start = data(st.none() | st.floats(0, 2).map(lambda s: round(s, 3)))
    length = data(st.none() | st.floats(0.1, 3).map(lambda s: round(s, 3)))
    return Job(
        frames=given.model_copy(update=changes),
        clip=clip and data(st.integers(0, 2)),
        window=(start, None if length is None else (start or 0.0) + length),
        num_frames=data(st.integers(1, 33)),
    )


def test_frames_of_any_stream_are_those_of_a_plain_decode() -> None:
    seen: Counter[str] = Counter()

    # The default draws are the same every time, so that what they hold is known; more are drawn anew.
    @hypothesis.settings(max_examples=EXAMPLES, database=None, derandomize=EXAMPLES == DEFAULT_EXAMPLES)
    @hypothesis.given(stream=streams(), jobs=st.lists(drawn_jobs(), min_size=3, max_size=3))
    def compare(stream: Stream, jobs: list[Job]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = stream.write(Path(folder) / f"a.{stream.suffix}")
            bucket = BucketConfig(num_frames=1, height=SIZE[1], width=SIZE[0])
            plain = plain_decode(path, bucket=bucket, resize=RESIZE)
            assert all(plain.sound)
            kept_open, kept_open_2 = LastMedia(), LastMedia()
            for job in jobs:
                result = job.run(path)
                others = [job.run(path, last=kept_open), job.run(path, threads=2, last=kept_open_2)]
                if isinstance(result, str):
                    assert others == [result, result]
                    assert result in MAY_REFUSE
                    seen[f"refused: {result}"] += 1
                    continue
                frames, record = result
                assert differences(frames, record, plain) == []
                assert record.repaired == []
                for other in others:
                    assert not isinstance(other, str)
                    np.testing.assert_array_equal(frames, other[0])
                    assert facts(record) == facts(other[1])
                start, end = job.window[0] or 0.0, job.window[1] or math.inf
                inside = [t for t in plain.times if start - 1e-6 <= t < end - 1e-6]
                assert abs(record.num_pictures - len(inside)) <= 2  # windows are cut at whole ticks
                seen["compared"] += 1
                seen[job.frames.policy] += 1
                seen["by plan"] += record.num_fed < len(plain.times)
                seen["blended"] += bool(record.interpolated)
                seen["edit list"] += bool(stream.hidden)
                seen["varying rate"] += len(set(stream.gaps)) > 1
                seen["open groups"] += stream.open_gop and stream.bframes > 0

    compare()
    assert seen["compared"] > EXAMPLES
    for name in ("by plan", "blended", "edit list", "varying rate", "open groups"):
        assert seen[name], f"no drawn stream had {name}: {seen}"


def test_the_comparison_sees_a_wrong_picture(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=30, gop=10, bframes=2)
    bucket = BucketConfig(num_frames=5, height=64, width=96)
    plain = plain_decode(path, bucket=bucket, resize=RESIZE)
    frames, _, record = decode_clip(
        path, frames=FramesConfig(), buckets=[bucket], resize=RESIZE, limits=LimitsConfig()
    )
    assert differences(frames, record, plain) == []
    swapped = frames[[0, 2, 1, 3, 4]]
    assert len(differences(swapped, record, plain)) == 2
    assert "it is the picture at 0.5" in differences(swapped, record, plain)[0]
    frames[4, 0, 0, 0] ^= 1
    assert "it is off by up to 1" in differences(frames, record, plain)[0]
    late = ClipRecord(**{**vars(record), "pts_s": [t + 0.01 for t in record.pts_s]})
    assert len(differences(swapped, late, plain)) == 5


SMALL = [
    "-video-with-dash-.mp4",
    "bear-vp9-odd-dimensions.webm",
    "bt601.mp4",
    "carphone_pristine.mp4",
    "derived_cut_mid_gop.ts",
    "derived_flower_480i_h264.mkv",
    "h264_10bits.mp4",
    "midroll-5s.mp4",
    "newtonscradle.gif",
    "roadtrip-vp92-10bit.webm",
    "sample_vvc.mp4",
    "test_res_change.h264",
    "testvid_1022ms.mp4",
    "transparent.webm",
    "video_90.mov",
    "video_desks.3gp",
]


def check(verdicts: list[Verdict]) -> None:
    assert len(verdicts) == 2 * len(POLICIES)
    assert [(v.policy, v.threads, v.wrong) for v in verdicts if v.wrong] == []
    assert [v.refused for v in verdicts if v.threads == 1] == [v.refused for v in verdicts if v.threads == 2]


@pytest.mark.parametrize("name", SMALL)
def test_small_real_clips_under_every_policy(clips_dir: Path, name: str) -> None:
    verdicts = check_clip(clips_dir / name)
    check(verdicts)
    assert not next(v for v in verdicts if v.policy == "uniform").refused
