"""HDR to SDR: known points of the standards, and what any mapping must keep."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tonemap import (
    ASSUMED_PEAK,
    BITS,
    SDR_WHITE,
    ToneMap,
    hlg_scene,
    pq_code,
    pq_light,
    source_peak,
    tone_curve,
)
from tests.videos import make_video

TOP = 2**BITS - 1
MASTERED = "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(40000000,50)"
MAPS = {
    name: ToneMap(name.rstrip("4"), peak=4000 if name == "PQ4" else 1000, wide=True)
    for name in ("PQ", "PQ4", "HLG", "")
}
RAMP = np.tile(np.arange(TOP + 1, dtype=np.uint16), (3, 1))


def mapped(name: str, *rgb: float) -> list[int]:
    codes = np.round(np.array(rgb) * TOP).astype(np.uint16)[:, None]
    found: list[int] = MAPS[name].apply(codes)[:, 0].tolist()
    return found


def test_curves_hit_the_points_the_standards_print() -> None:
    # ST 2084 and BT.2408: 10-bit codes of light in cd/m2; BT.2100 puts HLG code 0.5 at 1/12.
    for light, code in ((100, 0.508), (203, 0.581), (1000, 0.752), (4000, 0.903), (10000, 1)):
        assert pq_code(np.array(float(light))) == pytest.approx(code, abs=5e-4)
    assert hlg_scene(np.array([0, 0.5, 1])) == pytest.approx([0, 1 / 12, 1], abs=1e-4)
    assert hlg_scene(np.array([0.5 + 1e-9])) == pytest.approx([1 / 12], abs=1e-4)


@given(st.floats(0, 10000))
def test_pq_is_its_own_way_back(light: float) -> None:
    assert pq_light(pq_code(np.array(light))) == pytest.approx(light, rel=1e-6, abs=1e-6)


@given(st.floats(SDR_WHITE, 10000))
def test_the_tone_curve_keeps_the_dark_and_ends_at_white(peak: float) -> None:
    light = np.linspace(0, peak, 500)
    curve = tone_curve(light, peak=peak)
    assert curve[0] == pytest.approx(0, abs=1e-6)
    assert curve[-1] == pytest.approx(SDR_WHITE, rel=1e-3)
    assert (np.diff(curve) >= -1e-6).all()
    assert (curve <= light + 1e-6).all()
    assert tone_curve(np.array([10.0]), peak=peak) == pytest.approx([10], rel=0.02)


def test_a_source_no_brighter_than_white_is_left_alone() -> None:
    light = np.linspace(0, 203, 50)
    assert np.array_equal(tone_curve(light, peak=SDR_WHITE), light)


@pytest.mark.parametrize("name", MAPS)
def test_neutral_stays_neutral_black_black_and_brighter_is_never_darker(name: str) -> None:
    found = MAPS[name].apply(RAMP).astype(int)
    assert np.ptp(found, axis=0).max() <= 1
    assert (found[:, 0] == 0).all()
    assert (found[:, -1] == 255).all()
    assert (np.diff(found, axis=1) >= 0).all()


def test_known_lights_land_where_the_curve_puts_them() -> None:
    for light in (1, 10, 50, 100, 203, 500, 1000):
        code = float(pq_code(np.array(float(light))))
        shown = tone_curve(np.array(float(light)), peak=1000) / SDR_WHITE
        assert mapped("PQ", code, code, code) == pytest.approx([255 * float(shown) ** (1 / 2.4)] * 3, abs=1)
    # Reference white of a 1000 cd/m2 grade: 90 % of the SDR code, the rest is for highlights.
    assert mapped("PQ", 0.5807, 0.5807, 0.5807) == [230] * 3
    # HLG: 75 % is reference white, 203 cd/m2 on a display of 1000 (BT.2408), as in PQ.
    assert mapped("HLG", 0.75, 0.75, 0.75) == pytest.approx([230] * 3, abs=1)


def test_sdr_in_wide_primaries_keeps_neutrals_and_widens_colours() -> None:
    assert np.abs(MAPS[""].apply(RAMP).astype(int) - RAMP / TOP * 255).max() <= 1
    red, green, blue = mapped("", 0.6, 0.4, 0.4)
    assert red > 0.6 * 255 + 5
    assert green < 0.4 * 255
    assert abs(blue - 0.4 * 255) < 5
    # The red of BT.709 in BT.2020 light (BT.2087) comes back as pure red.
    code = [light ** (1 / 2.4) for light in (0.6274, 0.0691, 0.0164)]
    assert mapped("", *code) == pytest.approx([255, 0, 0], abs=6)


def test_primaries_are_left_alone_where_they_are_those_of_bt709() -> None:
    code = np.round(np.array([[0.5], [0.3], [0.2]]) * TOP).astype(np.uint16)
    found = ToneMap("", peak=SDR_WHITE, wide=False).apply(code)[:, 0]
    assert found.tolist() == pytest.approx([127.5, 76.5, 51], abs=1)


def test_the_peak_of_a_clip_without_side_data_is_assumed() -> None:
    assert source_peak(VideoFrame(16, 16, "yuv420p10le")) == ASSUMED_PEAK


@pytest.mark.parametrize(
    ("told", "peak"),
    [
        (f"{MASTERED}:max-cll=1600,400", 1600),
        (MASTERED, 4000),
        ("max-cll=90,20", SDR_WHITE),
        ("repeat-headers=1", ASSUMED_PEAK),
    ],
)
def test_the_peak_is_max_cll_else_that_of_the_mastering_display(
    tmp_path: Path, told: str, peak: float
) -> None:
    options = {"color_trc": "smpte2084", "x265-params": f"log-level=none:pools=1:{told}"}
    path = make_video(
        tmp_path / "hdr.mp4", codec="libx265", pix_fmt="yuv420p10le", num_frames=3, options=options
    )
    with av.open(str(path)) as container:
        assert [source_peak(frame) for frame in container.decode(video=0)] == [peak] * 3
