"""Timelines drawn for tests: constant rates, rounded to ticks, variable, with gaps, of one picture."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from hypothesis import strategies as st

from pipeline.timeline import Timeline


def timeline(
    pts: Sequence[int],
    *,
    last: int = 1,
    tick: Fraction = Fraction(1, 1000),
    sizes: Sequence[int] | None = None,
    keys: Sequence[int] = (0,),
    backward: Sequence[int] = (),
) -> Timeline:
    """Pictures at `pts`, the last one shown for `last` ticks; positions of key and backward pictures."""
    positions = range(len(pts))
    return Timeline(
        time_base=tick,
        origin=pts[0],
        pts=tuple(pts),
        end=pts[-1] + last,
        sizes=tuple(sizes) if sizes is not None else (100,) * len(pts),
        keys=tuple(p in keys for p in positions),
        backward=tuple(p in backward for p in positions),
    )


def rounded(fps: Fraction, count: int) -> Timeline:
    """A constant rate stored in whole milliseconds, as Matroska and FLV do."""
    return timeline([round(i * 1000 / fps) for i in range(count)], last=round(1000 / fps))


@st.composite
def constant(draw: st.DrawFn, max_pictures: int = 400) -> Timeline:
    interval, count = draw(st.integers(1, 5000)), draw(st.integers(1, max_pictures))
    start = draw(st.integers(-1000, 100_000))
    return timeline([start + i * interval for i in range(count)], last=interval)


@st.composite
def in_ticks(draw: st.DrawFn) -> Timeline:
    fps = draw(st.sampled_from([Fraction(24), Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60)]))
    return rounded(fps, draw(st.integers(1, 300)))


@st.composite
def variable(draw: st.DrawFn) -> Timeline:
    gaps = draw(st.lists(st.integers(1, 3000), min_size=3, max_size=120))
    pts = [draw(st.integers(-500, 500))]
    for gap in gaps[:-1]:
        pts.append(pts[-1] + gap)
    return timeline(pts, last=gaps[-1])


@st.composite
def with_gaps(draw: st.DrawFn) -> Timeline:
    """A constant rate with pictures missing."""
    interval, count = draw(st.integers(1, 100)), draw(st.integers(2, 300))
    lost = draw(st.sets(st.integers(1, count - 1), max_size=count // 2))
    start = draw(st.integers(1, count))
    lost |= set(range(start, min(count, start + draw(st.integers(0, 100)))))
    return timeline([i * interval for i in range(count) if i not in lost], last=interval)


def any_timeline() -> st.SearchStrategy[Timeline]:
    return st.one_of(constant(), in_ticks(), variable(), with_gaps())
