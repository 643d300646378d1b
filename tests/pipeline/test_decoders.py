"""Reading ahead and sizing, on decoders that only keep books: every row once, in order, whatever comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import decoders as module
from pipeline.child_decoder import DECODE_AHEAD, SLOTS, Row
from pipeline.decoders import Decoders, DecoderShare
from pipeline.fetch import Local
from pipeline.generation import Unit
from pipeline.sandbox import Clip, DecodeRequest, DecoderProcess, decode_settings
from schemas.config import PreprocessConfig
from schemas.errors import ClipError, RunError
from schemas.load import check_config
from tests.videos import make_video


class Books:
    """Decoders that are asked for clips and give them at once."""

    decode_s = 1.0

    def __init__(self) -> None:
        self.started: list[BookDecoder] = []
        self.asked: list[str] = []
        """Keys, as they were submitted."""
        self.most_held = 0
        self.breaks: Callable[[str], Exception | None] = lambda key: None
        """What submitting a row raises."""

    def start(self, settings: dict[str, Any], count: int) -> list[BookDecoder]:
        self.started += [BookDecoder(self) for _ in range(count)]
        return self.started[-count:]

    @property
    def alive(self) -> int:
        return sum(not decoder.closed for decoder in self.started)


class BookDecoder:
    protections: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, books: Books) -> None:
        self.books, self.closed, self.unreleased = books, False, 0
        self.jobs: deque[str] = deque()

    @property
    def held(self) -> int:
        return len(self.jobs) + self.unreleased

    def submit(self, row: Row, local: Local) -> None:
        assert not self.closed
        if (error := self.books.breaks(row["key"])) is not None:
            raise error
        self.books.asked.append(row["key"])
        self.jobs.append(row["key"])
        self.books.most_held = max(
            self.books.most_held, sum(each.held for each in self.books.started if not each.closed)
        )

    def result(self) -> Clip:
        key = self.jobs.popleft()
        if key.endswith("bad"):
            raise ClipError("open_failed", key)
        self.unreleased += 1
        record: Any = SimpleNamespace(key=key)
        frames = np.zeros((1, 2, 2, 3), np.uint8)
        return Clip(frames, 0, record, decode_s=self.books.decode_s, release=self._release)

    def _release(self) -> None:
        self.unreleased -= 1

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Books:
    return patched(monkeypatch)


def patched(monkeypatch: pytest.MonkeyPatch) -> Books:
    books = Books()
    monkeypatch.setattr(Decoders, "_start", lambda self, settings, count: books.start(settings, count))
    monkeypatch.setattr(module, "decode_settings", lambda config: {})
    return books


def config() -> PreprocessConfig:
    buckets = [{"num_frames": 9, "height": 32, "width": 48}]
    return check_config({"manifest": "m", "output": "o", "buckets": buckets}, PreprocessConfig, where="test")


def unit(number: int, rows: int) -> Unit:
    keys = [f"{number}.{i}{'bad' if i % 5 == 3 else ''}" for i in range(rows)]
    listed = {"source_digest": "content:0", "size": 1, "mtime_ns": 1}
    return Unit("latents", number, tuple({"key": key, "path": f"{key}.mp4", **listed} for key in keys))


def keys_of(clips: Iterator[tuple[Row, Clip | ClipError]]) -> list[str]:
    """The keys that came; each clip is the one of its row, and is released."""
    found = []
    for row, clip in clips:
        found.append(row["key"])
        assert isinstance(clip, ClipError) == row["key"].endswith("bad")
        if isinstance(clip, Clip):
            assert vars(clip.record)["key"] == row["key"]
            clip.release()
    return found


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    hints=st.lists(st.integers(-1, 6), min_size=6, max_size=6),
    share=st.builds(DecoderShare, st.integers(1, 3), st.integers(3, 5), st.sampled_from([0, 0, 1, 4])),
    ratios=st.lists(st.floats(0.1, 10.0), min_size=6, max_size=6),
)
def test_every_row_comes_once_and_in_order_whatever_was_hinted(
    sizes: list[int], hints: list[int], share: DecoderShare, ratios: list[float]
) -> None:
    units = [unit(number, rows) for number, rows in enumerate(sizes)]
    seconds: dict[str, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        books = patched(patch)
        decoders = Decoders(config(), share)
        for this, hint, ratio in zip(units, hints, ratios, strict=False):
            books.decode_s = ratio
            decoders.encoded(1.0, 1)
            then = units[hint] if 0 <= hint < len(units) else None
            assert keys_of(decoders.clips(this, seconds, then)) == [row["key"] for row in this.rows]
        assert books.alive <= share.at_most
        if share.window:
            assert books.most_held <= share.window
        decoders.close()
        assert books.alive == 0


def test_the_next_unit_is_begun_when_the_last_row_of_this_one_is_submitted(books: Books) -> None:
    decoders = Decoders(config(), DecoderShare(2, 2))
    here, then, other = unit(0, 6), unit(1, 6), unit(2, 3)
    clips = decoders.clips(here, {}, then)
    for _, clip in clips:
        if isinstance(clip, Clip):
            clip.release()
        assert not {"1.0", "1.1"} & set(books.asked) or set(books.asked) >= {row["key"] for row in here.rows}
    assert books.asked[6:] == [row["key"] for row in then.rows[: 2 * DECODE_AHEAD]]
    assert keys_of(decoders.clips(then, {})) == [row["key"] for row in then.rows]
    assert len(books.asked) == 12, "what was read ahead is used"
    assert len(books.started) == 2
    assert keys_of(decoders.clips(here, {}, then))
    assert keys_of(decoders.clips(other, {})) == [row["key"] for row in other.rows]
    assert all(decoder.closed for decoder in books.started[:2]), "and thrown away where another unit comes"


@pytest.mark.parametrize(("batch", "ahead"), [(1, 2 * DECODE_AHEAD), (6, 8), (100, 2 * SLOTS)])
def test_a_batch_is_read_ahead_over_the_border_of_units(books: Books, batch: int, ahead: int) -> None:
    decoders = Decoders(config(), DecoderShare(2, 2))
    decoders.batch = batch
    keys_of(decoders.clips(unit(0, 6), {}, unit(1, 40)))
    assert len(books.asked) == 6 + ahead


def test_the_time_of_decoders_is_theirs_without_what_was_loading(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    decoders, seconds = Decoders(config(), DecoderShare(3, 3)), dict[str, float]()
    decoders.begin(unit(0, 4))
    with decoders.uncounted():
        now += 50.0  # weights
    result = BookDecoder.result

    def slow(self: BookDecoder) -> Clip:
        nonlocal now
        now += 2.0
        return result(self)

    monkeypatch.setattr(BookDecoder, "result", slow)
    keys_of(decoders.clips(unit(0, 4), seconds))
    now += 1.0  # commit
    assert seconds == {"load": 2.0}, "the first clip comes when decoders have started"
    assert decoders.counted() == 3 * (3 * 2.0 + 1.0)
    assert decoders.counted() == 0.0
    now += 1.0
    decoders.close()
    now += 10.0
    assert decoders.counted() == 3.0


def test_slots_that_are_not_needed_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    make_video(path, num_frames=12)
    with DecoderProcess(**decode_settings(config()), slots=4) as decoder:
        places = set()
        for _ in range(4):
            decoder.submit(DecodeRequest(str(path)))
            clip = decoder.result()
            places.add(clip.frames.ctypes.data)
            clip.release()
    assert len(places) == 1


def test_a_unit_that_is_begun_is_decoded_while_the_caller_does_something_else(books: Books) -> None:
    decoders = Decoders(config(), DecoderShare(1, 1))
    decoders.begin(unit(0, 6))
    assert books.asked == ["0.0", "0.1"]
    assert len(keys_of(decoders.clips(unit(0, 6), {}))) == len(books.asked) == 6


def test_what_goes_wrong_ahead_is_raised_when_it_is_that_units_turn(books: Books) -> None:
    books.breaks = lambda key: RunError(f"{key} was replaced") if key == "1.1" else None
    decoders = Decoders(config())
    seconds: dict[str, float] = {}
    assert len(keys_of(decoders.clips(unit(0, 3), seconds, unit(1, 3)))) == 3
    with pytest.raises(RunError, match=r"1\.1 was replaced"):
        keys_of(decoders.clips(unit(1, 3), seconds))
    assert books.alive == 0, "nobody will ask for what they hold"
    assert len(keys_of(decoders.clips(unit(0, 3), seconds, unit(1, 3)))) == 3
    assert len(keys_of(decoders.clips(unit(2, 3), seconds))) == 3, "another unit has nothing to do with it"


def test_a_caller_that_stops_early_leaves_no_decoder_with_clips_of_it(books: Books) -> None:
    decoders = Decoders(config())
    clips: Any = decoders.clips(unit(0, 6), {})
    next(clips)
    clips.close()
    assert books.alive == 0
    assert len(keys_of(decoders.clips(unit(1, 3), {}))) == 3


def test_a_full_window_holds_back_but_for_one_clip(books: Books) -> None:
    """Clips that the caller does not release fill the window; the next one must come all the same."""
    decoders = Decoders(config(), DecoderShare(2, 2, window=3))
    kept = [clip for _, clip in decoders.clips(unit(0, 8), {}, unit(1, 3)) if isinstance(clip, Clip)]
    assert len(kept) == 7
    assert "1.0" not in books.asked
    for clip in kept:
        clip.release()
    books.most_held = 0
    assert len(keys_of(decoders.clips(unit(1, 9), {}, unit(2, 3)))) == 9
    assert books.most_held == 3


def test_the_number_of_decoders_follows_the_measured_ratio(books: Books) -> None:
    decoders = Decoders(config(), DecoderShare(1, 6))
    counts = []
    for number, decode_s in enumerate([1.0, 3.0, 2.8, 3.1, 2.6, 100.0, 0.3, 0.3]):
        books.decode_s = decode_s
        for _ in range(module.MEASURED + 1):
            decoders.encoded(2.0, 2)
        keys_of(decoders.clips(unit(number, 2 * module.MEASURED), {}))
        counts.append(books.alive)
    # 1.25 times the ratio, rounded up; small changes start and end nothing; never more than the share.
    assert counts == [2, 4, 4, 4, 4, 6, 1, 1]


def test_the_first_batch_says_nothing_of_the_pace(books: Books) -> None:
    decoders = Decoders(config(), DecoderShare(1, 4))
    decoders.encoded(60.0, 1)  # kernels are chosen
    keys_of(decoders.clips(unit(0, 3), {}))
    decoders.encoded(0.5, 1)
    keys_of(decoders.clips(unit(1, 3), {}))
    assert books.alive == 3


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_real_children_go_over_the_border_of_units(tmp_path: Path) -> None:
    rows: list[Row] = []
    for i in range(5):
        path = tmp_path / f"{i}.mp4"
        make_video(path, num_frames=12 + i)
        stat = path.stat()
        listed = {"source_digest": "content:0", "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        rows.append({"key": str(i), "path": str(path), **listed, "start_s": None, "end_s": None, "clip": 0})
    first, second = Unit("latents", 0, tuple(rows[:3])), Unit("latents", 1, tuple(rows[3:]))

    def frames(decoders: Decoders, *units: Unit, ahead: bool) -> list[np.ndarray]:
        found = []
        for i, this in enumerate(units):
            then = units[i + 1] if ahead and i + 1 < len(units) else None
            for _, clip in decoders.clips(this, {}, then):
                assert isinstance(clip, Clip)
                found.append(clip.frames.copy())
                clip.release()
                assert clip.frames.size == 0
        decoders.close()
        return found

    alone = frames(Decoders(config()), first, second, ahead=False)
    assert len(alone) == 5
    for share in (DecoderShare(), DecoderShare(2, 2)):
        ahead = frames(Decoders(config(), share), first, second, ahead=True)
        assert all(np.array_equal(a, b) for a, b in zip(alone, ahead, strict=True))

    decoders, replaced = Decoders(config()), Path(rows[4]["path"])
    for row, clip in decoders.clips(first, {}, second):
        assert isinstance(clip, Clip)
        clip.release()
        if row["key"] == "0":
            make_video(replaced, num_frames=30)
    with pytest.raises(RunError, match=r"4\.mp4 is gone or was replaced"):
        list(decoders.clips(second, {}))
