"""When each picture of a video is on screen, known from its packets alone.

In: one entry per picture. Out: sorted timestamps with the size and kind of each picture, cut to a time
window. Pure integers in the stream's time base, so that no rule built on them depends on
floating point. Zero seconds is the first picture, whatever the container's own start time.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Collection
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from schemas.errors import ClipError

MAX_GAP = 4
"""A gap of more than this many median intervals: something is missing there, and no blend crosses it."""


class Grid(NamedTuple):
    """A constant rate."""

    interval: Fraction
    """Ticks per picture."""
    slack: int
    """Ticks by which a timestamp may be off: 1 where the rate does not fit whole ticks."""


@dataclass(frozen=True)
class Timeline:
    """Pictures in presentation order."""

    time_base: Fraction
    """Seconds per tick."""
    origin: int
    """Tick of the stream's first picture: zero seconds, also inside a window."""
    pts: tuple[int, ...]
    """Tick at which each picture appears; strictly increasing, never empty."""
    end: int
    """Tick at which the last picture leaves the screen."""
    sizes: tuple[int, ...]
    """Bytes of each picture's packet."""
    keys: tuple[bool, ...]
    """Whether each picture's packet is flagged as a key frame."""
    backward: tuple[bool, ...]
    """Whether a picture shown later is fed to the decoder before it, as for B-pictures: these are smaller
    than others at the same activity."""

    @property
    def interval(self) -> Fraction:
        """Ticks per picture; the mean where the rate varies."""
        return (self.end - self.pts[0]) / Fraction(len(self.pts)) if self.grid is None else self.grid.interval

    @property
    def duration_s(self) -> float:
        """Seconds from the first picture's appearance to the last one's end."""
        return float((self.end - self.pts[0]) * self.time_base)

    @property
    def fps(self) -> float:
        """Pictures per second; the mean where the rate varies."""
        return float(1 / (self.interval * self.time_base))

    @functools.cached_property
    def grid(self) -> Grid | None:
        """The constant rate of the pictures, None where it varies."""
        n, span = len(self.pts) - 1, self.pts[-1] - self.pts[0]
        if n < 1:
            return None
        worst = max(abs((tick - self.pts[0]) * n - i * span) for i, tick in enumerate(self.pts))
        if worst == 0:
            return Grid(Fraction(span, n), 0)
        # One tick off the grid is rounding, unless ticks are so coarse that it could be a lost picture.
        return Grid(Fraction(span, n), 1) if worst <= n and span >= 4 * n else None

    def seconds(self, tick: int | Fraction) -> float:
        """Seconds from the stream's first picture."""
        return float((tick - self.origin) * self.time_base)

    def window(self, start_s: float | None, end_s: float | None) -> Timeline:
        """The pictures that appear in [start_s, end_s); ClipError `empty_window` when there are none."""
        first = 0 if start_s is None else bisect.bisect_left(self.pts, self._tick(start_s))
        last = len(self.pts) if end_s is None else bisect.bisect_left(self.pts, self._tick(end_s))
        if first >= last:
            raise ClipError(
                "empty_window",
                f"no picture appears in the window {start_s or 0:g} s to "
                f"{'the end' if end_s is None else f'{end_s:g} s'}; "
                f"the clip has pictures from 0 s to {self.seconds(self.pts[-1]):.3f} s",
            )
        end = self.pts[last] if last < len(self.pts) else self.end
        if end_s is not None:
            end = min(end, self._tick(end_s))
        return replace(
            self,
            pts=self.pts[first:last],
            end=end,
            sizes=self.sizes[first:last],
            keys=self.keys[first:last],
            backward=self.backward[first:last],
        )

    def without(self, pts: Collection[int]) -> Timeline:
        """The same timeline with some pictures taken out; ClipError `no_pictures` when none stays."""
        keep = [i for i, tick in enumerate(self.pts) if tick not in pts]
        if not keep:
            raise ClipError("no_pictures", f"none of {len(self.pts)} packets shows a picture")
        return replace(
            self,
            pts=tuple(self.pts[i] for i in keep),
            sizes=tuple(self.sizes[i] for i in keep),
            keys=tuple(self.keys[i] for i in keep),
            backward=tuple(self.backward[i] for i in keep),
        )

    def _tick(self, seconds: float) -> int:
        """Nearest tick; the decimal the person wrote counts, not its binary neighbour."""
        return self.origin + round(Fraction(repr(float(seconds))) / self.time_base)
