"""The survey of a manifest: every row in order, neighbours together, few rows ahead, one bad row a time."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import survey as module
from pipeline.clip import Placed
from pipeline.sandbox import DecoderProcess
from pipeline.survey import survey
from schemas.config import PreprocessConfig
from schemas.errors import ClipError, RunError
from schemas.manifest import ManifestRow
from tests.pipeline.placing import FakeDecoder
from tests.videos import make_video

CONFIG = PreprocessConfig.model_validate(
    {"manifest": "m", "output": "o", "buckets": ({"num_frames": 9, "height": 32, "width": 48},)}
)
DYING = """
import os
from pipeline import sandbox_child

place_clip = sandbox_child.place_clip

def place(path, **rest):
    if path.endswith("deadly.mp4"):
        os.abort()
    return place_clip(path, **rest)

sandbox_child.place_clip = place
sandbox_child.serve()
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeDecoder]:
    monkeypatch.setattr(module, "DecoderProcess", FakeDecoder)
    monkeypatch.setattr(FakeDecoder, "made", [])
    return FakeDecoder


FATAL = 9


def rows_of(paths: list[int]) -> list[ManifestRow]:
    """File 3 is refused, file 9 ends the run."""
    starts = {3: FakeDecoder.BAD, FATAL: FakeDecoder.FATAL}
    return [ManifestRow(i, "", f"/{path}", "x", start_s=starts.get(path)) for i, path in enumerate(paths)]


@given(st.lists(st.integers(0, 3), max_size=60))
def test_every_row_comes_back_in_order_with_its_own_answer(paths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DecoderProcess", FakeDecoder)
        patch.setattr(FakeDecoder, "made", [])
        rows = rows_of(paths)
        found = list(survey(rows, CONFIG))
        assert [row for row, _ in found] == rows
        for row, answer in found:
            assert isinstance(answer, ClipError) == (row.path == "/3")
        assert all(decoder.closed for decoder in FakeDecoder.made)


def test_a_failing_machine_ends_the_survey(fake: type[FakeDecoder]) -> None:
    with pytest.raises(RunError, match="does not start"):
        list(survey(rows_of([0, 1, FATAL, 2]), CONFIG))
    assert all(decoder.closed for decoder in fake.made)


def test_neighbours_of_one_file_meet_in_one_child_but_a_long_file_fills_all(
    fake: type[FakeDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    rows = [ManifestRow(i, "", f"/{i // 4}", "x", start_s=i % 4) for i in range(400)]
    assert len(list(survey(rows, CONFIG))) == 400
    for decoder in fake.made:
        paths = [request.path for request in decoder.placed]
        changes = sum(a != b for a, b in pairwise(paths))
        assert len(paths) == 4 * (changes + 1)
    assert len(fake.made) == 2
    runs = list(module._runs(ManifestRow(i, "", "/one", "x", start_s=i) for i in range(100)))
    assert max(len(run) for run in runs) < 100 // 4


def test_captions_of_a_window_share_one_look(fake: type[FakeDecoder]) -> None:
    starts = [None] * 64 + [0.5] * 40 + [1.0]
    rows = [ManifestRow(1, "", "/one", f"{i}", start_s=start) for i, start in enumerate(starts)]
    found = list(survey(rows, CONFIG, full=True))
    assert [row for row, _ in found] == rows
    assert all(isinstance(answer, Placed) for _, answer in found)
    placed = [request.start_s for decoder in fake.made for request in decoder.placed]
    assert sorted(placed, key=str) == [0.5, 1.0, None]
    endless = (ManifestRow(1, "", "/one", f"{i}") for i in range(1000))
    assert max(len(run) for run in module._runs(endless)) <= 64


def test_the_reader_is_only_a_few_rows_ahead(fake: type[FakeDecoder]) -> None:
    read = 0

    def rows() -> Iterator[ManifestRow]:
        nonlocal read
        for i in range(5000):
            read += 1
            yield ManifestRow(i, "", f"/{i}", "x")

    most = max(read - done for done, _ in enumerate(survey(rows(), CONFIG)))
    assert 1 < most <= module._AHEAD * (os.cpu_count() or 1) + module._NEIGHBOURS + 1


def test_a_survey_that_is_given_up_closes_its_children(fake: type[FakeDecoder]) -> None:
    found = survey((ManifestRow(i, "", f"/{i}", "x") for i in range(5000)), CONFIG)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert fake.made
    assert all(decoder.closed for decoder in fake.made)
    assert sum(len(decoder.placed) for decoder in fake.made) < 1000


def test_real_files_with_one_that_kills_its_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Placed rows carry the window's frames; a child that dies costs one row."""
    good = make_video(tmp_path / "good.mp4", num_frames=24, fps=24)
    deadly = make_video(tmp_path / "deadly.mp4", num_frames=24, fps=24)
    program = tmp_path / "dying.py"
    program.write_text(DYING)
    dying = functools.partial(DecoderProcess, program=[str(program)])
    monkeypatch.setattr(module, "DecoderProcess", dying)
    rows = [
        ManifestRow(1, "good.mp4", str(good), "x"),
        ManifestRow(2, "deadly.mp4", str(deadly), "x"),
        ManifestRow(3, "good.mp4", str(good), "x", start_s=0.5, end_s=0.75),
        ManifestRow(4, "good.mp4", str(good), "x", start_s=5.0),
    ]
    answers = [found for _, found in survey(rows, CONFIG, full=True)]
    first, second, third, last = answers
    assert isinstance(first, Placed)
    assert isinstance(third, Placed)
    assert (first.num_available, first.decoded and first.decoded.num_pictures) == (24, 24)
    assert (third.num_available, third.decoded and third.decoded.num_pictures) == (6, 6)
    assert [found.reason for found in (second, last) if isinstance(found, ClipError)] == [
        "decoder_crash",
        "empty_window",
    ]
