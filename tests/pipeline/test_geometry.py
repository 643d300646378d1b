"""Crops, fits and turns against their definitions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.geometry import Orientation, display_size, fit


@given(
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.fractions(Fraction(1, 4), 4, max_denominator=100),
    st.sampled_from([(720, 480), (480, 720), (16, 16)]),
    st.sampled_from(["cover_crop", "pad", "stretch"]),
)
def test_every_picture_fits(width: int, height: int, sar: Fraction, into: tuple[int, int], mode: str) -> None:
    place = fit(width, height, sar=sar, into=into, mode=mode)
    x, y, crop_width, crop_height = place.crop
    assert 0 <= x <= x + crop_width <= width
    assert 0 <= y <= y + crop_height <= height
    assert crop_width > 0
    assert crop_height > 0
    for part, whole, offset in ((crop_width, width, x), (crop_height, height, y)):
        assert part == whole or (part % 2 == 0 and offset % 2 == 0)
    assert 2 <= place.size[0] <= into[0]
    assert 2 <= place.size[1] <= into[1]
    if mode != "pad":
        assert place.size == into
    if mode != "stretch" and min(crop_width, crop_height, *place.size) > 2:
        # Even sizes may be one pixel off the exact one, on either side of the ratio.
        shown = Fraction(crop_width, crop_height) * sar / Fraction(*place.size)
        smallest = min(crop_width, crop_height, *place.size)
        assert abs(shown - 1) <= Fraction(21, 10) / smallest


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("flip_rows", [False, True])
@pytest.mark.parametrize("flip_columns", [False, True])
def test_orientations_are_turns_and_mirror_images(
    transpose: bool, flip_rows: bool, flip_columns: bool
) -> None:
    picture = np.arange(6).reshape(2, 3)
    orientation = Orientation(transpose, flip_rows=flip_rows, flip_columns=flip_columns)
    turned = np.rot90(picture, -orientation.rotation // 90)
    shown = orientation.apply(picture)
    if orientation.mirrored:
        assert any(np.array_equal(shown, np.flip(turned, axis)) for axis in (0, 1))
    else:
        assert np.array_equal(shown, turned)


def test_what_a_player_shows() -> None:
    assert display_size(64, 64, sar=Fraction(2), orientation=Orientation()) == (128, 64)
    assert display_size(64, 64, sar=Fraction(2), orientation=Orientation(transpose=True)) == (64, 128)
