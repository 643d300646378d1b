"""A decoder that opens no file: what a survey makes of many rows, at the speed of arithmetic."""

from __future__ import annotations

import threading
from typing import Any, ClassVar, Self

from pipeline.clip import ClipInfo, Decoded, Placed
from pipeline.sandbox import DecodeRequest
from schemas.errors import ClipError, RunError

INFO = ClipInfo(
    codec="h264",
    container="mp4",
    pixel_format="yuv420p",
    width=720,
    height=480,
    display_width=720,
    display_height=480,
    sar="1:1",
    rotation=0,
    fps=24.0,
    duration_s=10.0,
    num_pictures=240,
    num_key_pictures=20,
    color_matrix="bt709",
    color_range="limited",
    color_rule="tagged",
    color_transfer="bt709",
    interlaced=False,
    alpha=False,
    file_bytes=1000,
)


class FakeDecoder:
    """Stands in for `DecoderProcess`; a start time of `BAD` seconds is refused, of `FATAL` ends the run."""

    BAD, FATAL = 13.0, 17.125
    made: ClassVar[list[FakeDecoder]] = []

    def __init__(self, **_: Any) -> None:
        self.placed: list[DecodeRequest] = []
        self.closed = False
        self._alone = threading.Lock()
        self.made.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def place(self, request: DecodeRequest, *, full: bool = False) -> Placed:
        assert self._alone.acquire(blocking=False), "two threads at once"
        try:
            self.placed.append(request)
            if request.start_s == self.BAD:
                raise ClipError("decoder_crash", "the decoder died twice")
            if request.start_s == self.FATAL:
                raise RunError("the decoder process does not start")
            decoded = Decoded(240, 0, 0) if full else None
            return Placed(
                INFO, bucket=0, num_frames=49, num_available=240, num_clips=1, notes=[], decoded=decoded
            )
        finally:
            self._alone.release()
