"""Interlaced pictures: nothing lost in count or time, the same pictures whatever was decoded around them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
from av.filter import Graph
from av.video.frame import VideoFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.deinterlace import Deinterlacer, with_neighbours


def filtered(frame: VideoFrame, name: str, arguments: str) -> Graph:
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
    )
    graph.link_nodes(source, graph.add(name, arguments), graph.add("buffersink")).configure()
    return graph


def flagged(picture: np.ndarray, pixel_format: str = "gray", *, interlaced: bool = True) -> VideoFrame:
    """`picture`, top field first if it is interlaced."""
    frame = VideoFrame.from_ndarray(picture, pixel_format)
    graph = filtered(frame, "setfield", "mode=tff" if interlaced else "mode=prog")
    graph.push(frame)
    found = graph.pull()
    assert isinstance(found, VideoFrame)
    assert found.interlaced_frame == interlaced
    return found


def moving(n: int, *, width: int = 48, height: int = 32) -> np.ndarray:
    """A smooth pattern that slides two pixels from one field to the next."""
    y, x = np.mgrid[0:height, 0:width]
    picture = 128 + 100 * np.sin((x - 2 * n) / 4) * np.cos(y / 9)
    return np.round(picture).astype(np.uint8)


def woven(n: int) -> np.ndarray:
    """Picture n of an interlaced camera: even lines of field 2n, odd lines of field 2n + 1."""
    picture = moving(2 * n)
    picture[1::2] = moving(2 * n + 1)[1::2]
    return picture


def run(
    pts: Sequence[int], frames: dict[int, VideoFrame], deinterlacer: Deinterlacer | None = None
) -> dict[int, np.ndarray]:
    """Tick -> picture, in the order they came out."""
    deinterlacer = deinterlacer or Deinterlacer(pts)
    out = [pair for tick in sorted(frames) for pair in deinterlacer.push(tick, frames[tick])]
    out += deinterlacer.flush()
    assert [tick for tick, _ in out] == sorted(frames)
    return {tick: frame.to_ndarray() for tick, frame in out}


@given(st.sets(st.integers(0, 30)), st.data())
def test_neighbours_are_the_pictures_before_and_after(pts: set[int], data: st.DataObject) -> None:
    timeline = sorted(pts)
    wanted = data.draw(st.sets(st.sampled_from(timeline))) if timeline else set()
    found = with_neighbours(wanted, timeline)
    places = {timeline.index(tick) + k for tick in wanted for k in (-1, 0, 1)}
    assert found == {timeline[i] for i in places if 0 <= i < len(timeline)}


def test_an_interlaced_stream_comes_out_as_from_bwdif_itself() -> None:
    frames = {10 * n: flagged(woven(n)) for n in range(6)}
    found = run(sorted(frames), frames)
    graph, expected = filtered(frames[0], "bwdif", "mode=send_frame:deint=interlaced"), []
    for frame in [*frames.values(), None]:
        graph.push(frame)
        while True:
            try:
                picture = graph.pull()
            except (av.BlockingIOError, av.EOFError):
                break
            assert isinstance(picture, VideoFrame)
            expected.append(picture.to_ndarray())
    assert len(expected) == 6
    for ours, theirs in zip(found.values(), expected, strict=True):
        assert np.array_equal(ours, theirs)


@settings(max_examples=40)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.data())
def test_wanted_pictures_do_not_depend_on_what_else_was_decoded(
    flags: list[bool], data: st.DataObject
) -> None:
    pts = [7 * n for n in range(len(flags))]
    frames = {tick: flagged(woven(n), interlaced=flags[n]) for n, tick in enumerate(pts)}
    wanted = data.draw(st.sets(st.sampled_from(pts), min_size=1))
    whole = run(pts, frames)
    part = run(pts, {tick: frames[tick] for tick in with_neighbours(wanted, pts)})
    for tick in wanted:
        assert np.array_equal(part[tick], whole[tick])
    for n, tick in enumerate(pts):
        # Progressive pictures are not touched; of interlaced ones the first field stays.
        same = slice(None, None, 2 if flags[n] else 1)
        assert np.array_equal(whole[tick][same], woven(n)[same])


def test_motion_is_rebuilt_and_stillness_kept() -> None:
    pts = range(8)
    found = run(pts, {n: flagged(woven(n)) for n in pts})
    for n in pts[1:-1]:
        before, after = (np.square(p - moving(2 * n).astype(float)).mean() for p in (woven(n), found[n]))
        assert after < before / 20
    still = run(pts, {n: flagged(moving(0)) for n in pts})
    assert all(np.array_equal(still[n], moving(0)) for n in pts[1:])


def test_after_a_gap_the_pictures_before_it_are_not_used() -> None:
    frames = {n: flagged(woven(n)) for n in (0, 1, 5, 6)}
    found = run(range(8), frames)
    alone = run(range(8), {n: frames[n] for n in (5, 6)})
    assert np.array_equal(found[5], alone[5])
    assert np.array_equal(found[1], run(range(8), {n: frames[n] for n in (0, 1)})[1])


def test_size_and_format_may_change_between_pictures() -> None:
    pictures = [
        flagged(woven(0)),
        flagged(woven(1)),
        flagged(moving(0, width=64)),
        flagged(moving(1, width=64)),
    ]
    pictures.append(flagged(np.full((48, 64), 90, np.uint8), "yuv420p"))
    frames = dict(enumerate(pictures))
    deinterlacer = Deinterlacer(range(5))
    found = run(range(5), frames, deinterlacer)
    assert [picture.shape for picture in found.values()] == [(32, 48), (32, 48), (32, 64), (32, 64), (48, 64)]
    assert deinterlacer.interlaced


@pytest.mark.parametrize("size", [(1, 1), (2, 15), (15, 40), (16, 16), (17, 19)])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv410p", "yuv420p10le", "gray", "nv12", "rgb24"])
def test_pictures_of_any_size_and_format_pass(size: tuple[int, int], pixel_format: str) -> None:
    deinterlacer = Deinterlacer(range(3))
    out = [pair for tick in range(3) for pair in deinterlacer.push(tick, VideoFrame(*size, pixel_format))]
    out += deinterlacer.flush()
    assert [(tick, frame.width, frame.height) for tick, frame in out] == [(tick, *size) for tick in range(3)]
    assert not deinterlacer.interlaced
