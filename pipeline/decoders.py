"""The decoders of a worker: rows of a unit in, their clips out, in order, decoded ahead of the caller.

Every decoder keeps about one core busy: a sandboxed child here, or an actor with such a child elsewhere
(`pipeline.remote_decoders`). Reading goes on over the border of a unit, into the one that most likely comes
next; where another comes, what was decoded of it is thrown away. The number of children follows the measured
ratio of decoding to encoding, so that the encoder seldom waits and no more cores are taken than that needs;
what they read ahead is at least a batch, which the encoder takes at once.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.child_decoder import DECODE_AHEAD, SLOTS, ChildDecoder, Decoder, Row, listed
from pipeline.fetch import Fetcher, Local
from pipeline.generation import Unit
from pipeline.sandbox import Clip, decode_settings
from schemas.config import PreprocessConfig
from schemas.errors import ClipError

FETCH_AHEAD = 4
"""Remote files of a decoder that are fetched before their turn."""
SPARE = 1.25
"""Decoders per decoder that the mean ratio asks for: clips differ."""
MEASURED = 16
"""Clips decoded, and batches encoded, that the ratio is taken of."""
SURPLUS = 1.5
"""Decoders above what the ratio asks for before some are ended: starting one costs what it decodes in a
second."""


@dataclass(frozen=True)
class DecoderShare:
    """What a worker may have of decoders."""

    at_least: int = 1
    at_most: int = 1
    window: int = 0
    """Clips that may be under way in Ray's object store, where decoders are actors; 0: they are children."""


ONE_CHILD = DecoderShare()
Note = Callable[[str, str], None]
"""Takes the kind of an incident and a sentence."""


class Decoders:
    """As many decoders as `share` allows and the encoder asks for, started with the first clip and kept."""

    def __init__(
        self,
        config: PreprocessConfig,
        share: DecoderShare = ONE_CHILD,
        *,
        note: Note = lambda *_: None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`note` hears what gave way, `tell` what is waited for."""
        self._config, self._share, self._note, self._tell = config, share, note, tell
        self._fetcher = Fetcher(config.sources, config.limits)
        self._settings: dict[str, Any] | None = None
        self._decoders: list[Decoder] = []
        self._ahead: _Stream | None = None
        self._decode_s: deque[float] = deque(maxlen=MEASURED)
        self._encode_s: deque[tuple[float, int]] = deque(maxlen=MEASURED)
        self.batch = 1
        """Clips that the encoder takes at once: so many are read ahead, as far as there are slots for."""
        self._warm = False
        self._counted, self._since = 0.0, time.perf_counter()
        """Seconds that there were decoders, of all of them together, up to a time."""
        if share.window:  # Ray takes its time to place actors, and a worker is ready when they are
            self._fit()

    @property
    def protections(self) -> dict[str, str]:
        """What is in force around a decoder, as its child reports it."""
        return next((each.protections for each in self._decoders if each.protections), {})

    def counted(self) -> float:
        """Seconds since the last call, times decoders; without those that were `uncounted`."""
        self._count()
        counted, self._counted = self._counted, 0.0
        return counted

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """For what is loading, and no part of anything's pace."""
        self._count()
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def encoded(self, seconds: float, clips: int) -> None:
        """Told by the encoder after every batch. The first, in which kernels are chosen, does not count."""
        if self._warm:
            self._encode_s.append((seconds, clips))
        self._warm = True

    def close(self) -> None:
        """End the decoders and drop what they hold."""
        if self._ahead is not None:
            self._ahead.rows.close()
            self._ahead = None
        self._count()
        while self._decoders:
            self._decoders.pop().close()

    def begin(self, unit: Unit) -> None:
        """Have the first clips of `unit` decoded, while the caller is busy otherwise."""
        if self._ahead is None:
            self._ahead = self._stream(unit)
            self._fill_ahead(self._ahead, self._fit())

    def clips(
        self, unit: Unit, seconds: dict[str, float], then: Unit | None = None
    ) -> Generator[tuple[Row, Clip | ClipError], None, None]:
        """Every row with its clip or its failure, in order. Once all of them are being decoded, so are the
        first of `then`: kept for the next call, if that is for the same unit.

        The wait for the first clip of all, which comes when decoders have started, is added to
        `seconds["load"]`.
        """
        if self._ahead is not None and self._ahead.unit != unit:
            self.close()
        stream, self._ahead = self._ahead or self._stream(unit), None
        try:
            while True:
                count = self._fit()
                self._fill(stream, count)
                if then is not None and then.family == "latents" and stream.ended:
                    self._ahead = self._ahead or self._stream(then)
                    self._fill_ahead(self._ahead, count, behind=stream)
                if not stream.waiting:
                    if stream.error is not None:
                        raise stream.error
                    return
                row, decoder = stream.waiting.popleft()
                with contextlib.ExitStack() as starting:
                    if not self._decode_s:
                        starting.enter_context(self.uncounted())
                        starting.enter_context(clock(seconds, "load"))
                    try:
                        clip: Clip | ClipError = (decoded := decoder.result())
                        self._decode_s.append(decoded.decode_s)
                    except ClipError as error:
                        clip = error
                yield row, clip
        finally:
            stream.rows.close()
            if stream.waiting or not stream.ended:
                self.close()  # the decoders hold clips that nobody will ask for

    def _stream(self, unit: Unit) -> _Stream:
        if self._share.window:  # fetched where they are decoded
            return _Stream(unit, ((row, Local(row["path"])) for row in unit.rows))
        wanted = ((row, row["path"], listed(row)) for row in unit.rows)
        return _Stream(unit, self._fetcher.ahead(wanted, files=FETCH_AHEAD * self._wanted()))

    def _fill(self, stream: _Stream, count: int, *, behind: _Stream | None = None) -> None:
        """Submit rows while there is room for their clips, beside those of the stream they are `behind`; one,
        whatever the room, where the caller waits and none is coming."""
        ready = self._decoders[:count]
        while stream.error is None and not stream.ended:
            coming = len(stream.waiting) + (len(behind.waiting) if behind else 0)
            full = coming >= max(DECODE_AHEAD * count, min(SLOTS * count, self.batch + count))
            if self._share.window:
                full = full or sum(each.held for each in self._decoders) >= self._share.window
            if full and (coming or behind):
                return
            taken = next(stream.rows, None)
            if taken is None:
                stream.ended = True
                return
            decoder = min(ready, key=lambda each: each.held)
            decoder.submit(*taken)
            stream.waiting.append((taken[0], decoder))

    def _fill_ahead(self, stream: _Stream, count: int, *, behind: _Stream | None = None) -> None:
        """The same for a unit that comes later; what goes wrong is raised when it is its turn."""
        try:
            self._fill(stream, count, behind=behind)
        except Exception as error:
            stream.error = error

    def _fit(self) -> int:
        """Start and end decoders; how many are to be given rows. One too many ends when it is idle."""
        count = self._wanted()
        self._count()
        if (more := count - len(self._decoders)) > 0:
            if self._settings is None:
                self._settings = decode_settings(self._config)
            self._decoders += self._start(self._settings, more)
            self._since = time.perf_counter()
        for decoder in [each for each in self._decoders[count:] if not each.held]:
            decoder.close()
            self._decoders.remove(decoder)
        return count

    def _count(self) -> None:
        since, self._since = self._since, time.perf_counter()
        self._counted += len(self._decoders) * (self._since - since)

    def _start(self, settings: dict[str, Any], count: int) -> Sequence[Decoder]:
        if not self._share.window:
            return [ChildDecoder(settings) for _ in range(count)]
        from pipeline.remote_decoders import start

        return start(count, settings, self._config, note=self._note, tell=self._tell)

    def _wanted(self) -> int:
        """Decoders for SPARE times the mean ratio of decoding to encoding, within the share."""
        share, have = self._share, max(1, len(self._decoders))
        if not self._decode_s or not self._encode_s:
            return min(share.at_most, max(share.at_least, have))
        encode_s = sum(seconds for seconds, _ in self._encode_s) / sum(clips for _, clips in self._encode_s)
        asked = SPARE * sum(self._decode_s) / len(self._decode_s) / max(encode_s, 1e-9)
        wanted = have if have - SURPLUS <= asked <= have else math.ceil(asked)
        return min(share.at_most, max(share.at_least, wanted))


class _Stream:
    """The rows of a unit on their way through the decoders."""

    def __init__(self, unit: Unit, rows: Generator[tuple[Row, Local], None, None]) -> None:
        self.unit, self.rows = unit, rows
        self.waiting: deque[tuple[Row, Decoder]] = deque()
        self.ended = False
        """Whether every row was submitted."""
        self.error: Exception | None = None


class clock:
    """Adds the wall clock of a `with` block to `seconds[stage]`."""

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self._seconds, self._stage = seconds, stage

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._started
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + spent
