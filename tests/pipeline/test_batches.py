"""Batches and the order of rows: nothing lost, nothing mixed, nobody waits for what could go on beside."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import batches as batches_module
from pipeline.batches import Batches, Spent
from pipeline.encoders import Encoders, Starved
from pipeline.row_order import RowOrder
from pipeline.video_encode import DctEncoder, Moments
from schemas.config import PreprocessConfig, VideoEncoderConfig

SHAPES = [(1, 4, 4), (1, 4, 8), (5, 4, 4)]


class Plain(DctEncoder):
    """The mean of a clip's pixels; two buffers of a shape, given in turn."""

    def __init__(self, batch: int = 3) -> None:
        super().__init__(VideoEncoderConfig())
        self.batch = batch
        self.begun: list[list[int]] = []
        self.under_way = 0
        self.threads: set[int] = set()
        self._buffers: dict[tuple[int, int, int], list[np.ndarray]] = {}

    def batch_size(self, shape: tuple[int, int, int]) -> int:
        return self.batch

    def buffer(self, num_clips: int, shape: tuple[int, int, int]) -> np.ndarray:
        pair = self._buffers.setdefault(shape, [np.zeros((num_clips, *shape, 3), np.uint8) for _ in "ab"])
        pair.reverse()
        return pair[0]

    def begin(self, frames: np.ndarray, *, tiled: bool = False) -> Callable[[], Moments]:
        assert self.under_way == 0
        self.under_way += 1
        self.threads.add(threading.get_ident())
        self.begun.append(frames[:, 0, 0, 0, 0].tolist())

        def wait() -> Moments:
            found = torch.from_numpy(frames.mean(axis=(1, 2, 3, 4)))
            self.under_way -= 1
            return {"mean": found}

        return wait


def run(encoder: Plain, rows: Sequence[tuple[int, int, int] | None]) -> list[float | None]:
    """What is written of rows that are clips of a shape, filled with their number, or failures."""
    written: list[float | None] = []
    encoders = Encoders(PreprocessConfig(manifest="m", output="o"))
    encoders._video = encoder

    def write(number: int, outcome: float | None) -> None:
        assert number == len(written)
        written.append(outcome)

    def done(numbers: list[int], moments: Moments) -> None:
        order.put([(n, partial(moments["mean"][i].item)) for i, n in enumerate(numbers)])

    clips: list[int] = []
    with (
        RowOrder(write) as order,
        Batches(encoder, encoders, done=done, encoded=lambda spent: clips.append(spent.clips)) as batches,
    ):
        for number, shape in enumerate(rows):
            if shape is None:
                order.put([(number, lambda: None)])
            else:
                batches.add(number, np.full((*shape, 3), number, np.uint8), tiled=False)
        batches.finish()
        order.finish()
    assert sum(clips) == sum(row is not None for row in rows)
    return written


rows_of_clips = st.lists(st.sampled_from([*SHAPES, None]), max_size=40)


@given(rows=rows_of_clips, batch=st.integers(1, 8), held=st.sampled_from([0, 200, 2**30]))
def test_every_row_is_written_once_in_order_and_batches_follow_from_the_rows_alone(
    rows: list[tuple[int, int, int] | None], batch: int, held: int
) -> None:
    encoder, again = Plain(batch), Plain(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "HELD_BYTES", held)
        written = run(encoder, rows)
        assert run(again, rows) == written
    assert written == [None if shape is None else number for number, shape in enumerate(rows)]
    assert again.begun == encoder.begun
    for numbers in encoder.begun:
        assert len(numbers) <= batch
        assert len({rows[number] for number in numbers}) == 1


def test_a_rare_shape_does_not_hold_back_more_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "HELD_BYTES", 10 * 4 * 4 * 3)
    encoder = Plain(2)
    run(encoder, [(1, 4, 8), *[(1, 4, 4)] * 20])
    assert encoder.begun.index([0]) == 4  # after 8 clips of the other shape, in 4 batches


def test_many_shapes_do_not_wait_for_the_last_row() -> None:
    encoder = Plain(4)
    run(encoder, [(1 + i % 8, 4, 4) for i in range(32)])
    assert encoder.begun == [[number] for number in range(32)], "no batch of four fills before the 25th clip"
    two = Plain(4)
    run(two, [(1 + i % 2, 4, 4) for i in range(16)])
    assert [len(numbers) for numbers in two.begun] == [3, 4, 3, 3, 2, 1]


def test_what_batches_that_are_not_full_have_room_for_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    class AtOnce:
        """Runs what is submitted before it returns."""

        def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
            future = Future[Any]()
            future.set_result(function(*args))
            return future

    class Counting(Plain):
        room, most = 0, 0

        def buffer(self, num_clips: int, shape: tuple[int, int, int]) -> np.ndarray:
            buffer = np.zeros((num_clips, *shape, 3), np.uint8)
            self.room += buffer.nbytes
            self.most = max(self.most, self.room)
            return buffer

        def begin(self, frames: np.ndarray, *, tiled: bool = False) -> Callable[[], Moments]:
            self.room -= frames[0].nbytes * self.batch
            return super().begin(frames, tiled=tiled)

    monkeypatch.setattr(batches_module, "HELD_BYTES", 3 * 64 * 4 * 4 * 3)
    encoder = Counting(64)
    encoders = Encoders(PreprocessConfig(manifest="m", output="o"))
    encoders._video, encoders.thread = encoder, AtOnce()  # type: ignore[assignment]
    with Batches[int](encoder, encoders, done=lambda *_: None, encoded=lambda _: None) as batches:
        for number, (height, width) in enumerate([(2, 8), (4, 4), (8, 2), (1, 16), (16, 1)]):
            batches.add(number, np.full((1, height, width, 3), number, np.uint8), tiled=False)
        assert encoder.begun == [[0], [1]]
        batches.finish()
    assert (encoder.most, encoder.room) == (batches_module.HELD_BYTES, 0)


def test_the_next_batch_is_filled_while_an_encoder_keeps_its_caller_busy() -> None:
    next_clip_is_there = threading.Event()

    class Blocking(Plain):
        def begin(self, frames: np.ndarray, *, tiled: bool = False) -> Callable[[], Moments]:
            assert next_clip_is_there.wait(60), "no clip is taken while one batch is begun"
            return super().begin(frames, tiled=tiled)

    encoder = Blocking(2)
    encoders = Encoders(PreprocessConfig(manifest="m", output="o"))
    encoders._video = encoder
    spent: list[Spent] = []
    for _ in range(2):
        with Batches[int](encoder, encoders, done=lambda *_: None, encoded=spent.append) as batches:
            for number in range(4):
                batches.add(number, np.full((1, 4, 4, 3), number, np.uint8), tiled=False)
                if number == 2:
                    next_clip_is_there.set()
            batches.finish()
    assert encoder.begun == [[0, 1], [2, 3]] * 2
    assert len(encoder.threads) == 1, "the same for all units"
    assert [each.clips for each in spent] == [2] * 4
    assert all(each.busy_s > 0 and each.waited_s >= 0 for each in spent)


def test_nothing_is_begun_after_a_batch_that_failed() -> None:
    class Broken(Plain):
        def begin(self, frames: np.ndarray, *, tiled: bool = False) -> Callable[[], Moments]:
            self.begun.append(frames[:, 0, 0, 0, 0].tolist())
            raise torch.OutOfMemoryError("CUDA out of memory")

    encoder = Broken(1)
    with pytest.raises(Starved):
        run(encoder, [(1, 4, 4)] * 3)
    assert encoder.begun == [[0]]


def test_clips_of_one_shape_are_not_mixed_with_those_in_tiles() -> None:
    encoder = Plain(4)
    encoders = Encoders(PreprocessConfig(manifest="m", output="o"))
    encoders._video = encoder
    with Batches[int](encoder, encoders, done=lambda *_: None, encoded=lambda _: None) as batches:
        for number in range(6):
            batches.add(number, np.full((1, 4, 4, 3), number, np.uint8), tiled=number in (2, 3))
        batches.finish()
    assert encoder.begun == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("late", [False, True])
def test_want_of_memory_says_over_what(late: bool) -> None:
    class Small(Plain):
        def begin(self, frames: np.ndarray, *, tiled: bool = False) -> Callable[[], Moments]:
            def wait() -> Moments:
                raise torch.OutOfMemoryError("CUDA out of memory")

            return wait if late else wait()  # type: ignore[return-value]

    with pytest.raises(Starved, match="encoding 3 clips of 1x4x4 at once") as found:
        run(Small(), [(1, 4, 4)] * 3)
    assert (found.value.lack.count, found.value.lack.shape) == (3, (1, 4, 4))


def test_an_error_of_the_writer_stops_who_hands_over() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    written: list[int] = []

    def write(number: int, outcome: int) -> None:
        if number == 1:
            raise full
        written.append(outcome)

    def hand_over() -> None:
        with RowOrder(write) as order:
            for number in range(100):
                order.put([(number, lambda: 7)])
            order.finish()

    with pytest.raises(OSError, match="No space") as found:
        hand_over()
    assert found.value is full
    assert written == [7]


def test_a_writer_that_is_slow_holds_up_who_hands_over() -> None:
    """No more than two batches wait to be written."""
    go = threading.Event()
    handed: list[int] = []

    def write(number: int, outcome: int) -> None:
        assert go.wait(60)

    def hand_over() -> None:
        with RowOrder(write) as order:
            for number in range(5):
                order.put([(number, lambda: 0)])
                handed.append(number)
                if number == 1:
                    third.set()
            order.finish()

    third = threading.Event()
    thread = threading.Thread(target=hand_over)
    thread.start()
    assert third.wait(60)
    assert handed == [0, 1]
    go.set()
    thread.join(60)
    assert handed == [0, 1, 2, 3, 4]
