"""An open file: nothing decoded twice, kept for its next row, and the same pictures from all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.media import LastMedia, Media
from schemas.config import LimitsConfig
from schemas.errors import ClipError
from tests.pipeline.test_decode import damage, decode, numbers
from tests.videos import make_video


def test_going_on_from_the_first_picture_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=30, gop=30, bframes=2)
    warm = decode(path, num_frames=30)
    only_one = decode(path, num_frames=1)
    assert numbers(only_one) == [0]
    monkeypatch.setattr(Media, "take_warm", lambda _: None)
    for num_frames, found in ((30, warm), (1, only_one)):
        np.testing.assert_array_equal(decode(path, num_frames=num_frames)[0], found[0])


def test_two_threads_give_the_same_pictures(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", num_frames=60, gop=20, bframes=2)
    for _ in range(2):
        for num_frames in (7, 50):
            one, two = (decode(path, num_frames=num_frames, threads=threads) for threads in (1, 2))
            np.testing.assert_array_equal(one[0], two[0])
            assert one[2].repaired == two[2].repaired
        damage(path, 56)  # and the same ones are damaged
    assert one[2].repaired


class NoSecondOpening(LastMedia):
    """Says which files it opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[Media] = []

    @contextmanager
    def open(self, path: str | Path, *, limits: LimitsConfig, threads: int = 1) -> Iterator[Media]:
        with super().open(path, limits=limits, threads=threads) as media:
            if media not in self.opened:
                self.opened.append(media)
            yield media


def test_the_next_row_of_a_file_finds_it_open(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=60, gop=10, bframes=2)
    other = make_video(tmp_path / "b.mp4", num_frames=30)
    rows: list[dict[str, Any]] = [{"start_s": 1.0}, {"end_s": 1.0}, {}, {"start_s": 0.5, "end_s": 2.0}]
    with closing(NoSecondOpening()) as last:
        for row in rows:
            kept, fresh = decode(path, last=last, **row), decode(path, **row)
            np.testing.assert_array_equal(kept[0], fresh[0])
            assert kept[2] == fresh[2]
        assert len(last.opened) == 1
        decode(other, last=last)
        decode(path, last=last)
        assert len(last.opened) == 3
        with pytest.raises(ClipError):
            decode(path, last=last, start_s=9.0)
        decode(path, last=last)
        assert len(last.opened) == 4  # not trusted after an error


def test_a_file_with_damage_is_not_kept_open(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", num_frames=60, gop=10)
    damage(path, 38)
    with closing(NoSecondOpening()) as last:
        for _ in range(2):
            np.testing.assert_array_equal(
                decode(path, num_frames=30, last=last)[0], decode(path, num_frames=30)[0]
            )
        assert len(last.opened) == 2
