"""Activity: packet sizes by kind, true luma changes, and the bonus at scene cuts."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.activity import luma_activity, packet_activity
from pipeline.container import open_video
from pipeline.packets import read_packets
from pipeline.timeline import Timeline
from schemas.config import LimitsConfig
from tests.pipeline.timelines import any_timeline, timeline
from tests.videos import make_video


def steady(num_pictures: int, *, busy: range, gop: int) -> Timeline:
    """Key, forward and backward pictures of different sizes, all five times as large in `busy`."""
    keys = range(0, num_pictures, gop)
    backward = [p for p in range(num_pictures) if p not in keys and p % 3]
    sizes = [
        (5 if p in busy else 1) * (9000 if p in keys else 300 if p in backward else 1500)
        for p in range(num_pictures)
    ]
    return timeline([p * 40 for p in range(num_pictures)], last=40, sizes=sizes, keys=keys, backward=backward)


def test_sizes_count_against_their_own_kind() -> None:
    activity = packet_activity(steady(200, busy=range(80, 100), gop=50))
    assert set(activity[:78]) == set(activity[102:]) == {0}
    assert min(activity[82:98]) == max(activity[82:98]) > 0


@given(any_timeline(), st.lists(st.integers(0, 10**6), min_size=400, max_size=400), st.data())
def test_every_picture_has_an_activity(clip: Timeline, sizes: list[int], data: st.DataObject) -> None:
    count = len(clip.pts)
    marks = st.sets(st.integers(0, count - 1))
    clip = timeline(clip.pts, sizes=sizes[:count], keys=[*data.draw(marks)], backward=[*data.draw(marks)])
    activity = packet_activity(clip)
    assert len(activity) == count
    assert min(activity) >= 0


def test_one_huge_packet_counts_no_more_than_64_usual_ones() -> None:
    sizes = [100] * 50
    sizes[20] = 10**6
    spike = packet_activity(timeline(range(50), sizes=sizes))
    sizes[20] = 64 * 100
    assert packet_activity(timeline(range(50), sizes=sizes)) == spike


def test_a_key_out_of_turn_is_a_scene_cut() -> None:
    cut = packet_activity(timeline(range(300), keys=(0, 100, 140, 240)))
    assert {p for p, value in enumerate(cut) if value} == {138, 139, 140, 141, 142}


def test_keys_in_turn_or_everywhere_tell_nothing() -> None:
    for keys in (
        range(0, 300, 50),
        (0, 100, 200),
        (0,),
        range(300),
        [*range(0, 100, 5), *range(101, 300, 3)],
    ):
        assert set(packet_activity(timeline(range(300), keys=keys))) == {0}


def test_luma_is_measured_above_the_usual() -> None:
    clip = timeline([0, 10, 20, 30, 40, 50, 60, 70])
    changes = {10: 2.0, 20: 2.0, 30: 12.0, 40: 7.0, 50: 2.0, 70: 2.5}
    found = luma_activity(clip, changes)
    assert [value / 1024 for value in found] == [0, 0, 0, 9.5, 4.5, 0, 0, 0]
    assert luma_activity(clip, {}) == [0] * 8


@given(st.lists(st.floats(0, 255), min_size=1, max_size=50))
def test_luma_order_is_kept(changes: list[float]) -> None:
    clip = timeline(range(len(changes)))
    found = luma_activity(clip, dict(enumerate(changes)))
    order = sorted(range(len(changes)), key=lambda p: changes[p])
    assert [found[p] for p in order] == sorted(found)
    assert sorted(found)[len(found) // 2] == 0


def test_pictures_fed_after_a_later_one_are_the_b_pictures(tmp_path: Path) -> None:
    path = make_video(tmp_path / "b.mp4", num_frames=40, gop=20, bframes=2)
    with open_video(path, limits=LimitsConfig()) as video:
        found = read_packets(video, limits=LimitsConfig()).timeline
    with av.open(str(path)) as container:
        types = [frame.pict_type for frame in container.decode(video=0)]
    assert found.backward == tuple(kind == av.video.frame.PictureType.B for kind in types)
    assert any(found.backward)


def test_a_burst_of_motion_shows_in_the_packets_of_a_real_encoder(tmp_path: Path) -> None:
    scene = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    pictures = [np.roll(scene, 5 * max(0, min(i - 60, 15)), axis=1) for i in range(135)]
    path = make_video(tmp_path / "burst.mp4", pictures=pictures, gop=250, bframes=2)
    with open_video(path, limits=LimitsConfig()) as video:
        activity = packet_activity(read_packets(video, limits=LimitsConfig()).timeline)
    assert sum(activity[58:78]) > 0.8 * sum(activity)
