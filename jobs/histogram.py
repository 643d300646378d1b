"""Quantiles of any number of values in little memory.

In: values >= 0, one at a time or an array at once. Out: exact least, greatest and sum; quantiles to 1 %,
exact where values that lie close together are equal (as rates and sizes are); bars. The trade-off: 70 bins
per factor of two.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

_RATIO = math.log(1.01)


class Histogram:
    """Bins one per cent wide, each with the count and the sum of its values."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = 0.0
        self.min = math.inf
        self.max = -math.inf
        self._bins: defaultdict[int | None, list[float]] = defaultdict(lambda: [0, 0.0])

    def add(self, value: float) -> None:
        self.count += 1
        self.sum += value
        self.min, self.max = min(self.min, value), max(self.max, value)
        found = self._bins[math.floor(math.log(value) / _RATIO) if value > 0 else None]
        found[0] += 1
        found[1] += value

    def add_all(self, values: np.ndarray) -> None:
        """As `add` of every value; whole arrays at a time, for columns of many rows."""
        values = values.astype(np.float64)
        if not values.size:
            return
        self.count += values.size
        self.sum += float(values.sum())
        self.min, self.max = min(self.min, float(values.min())), max(self.max, float(values.max()))
        above = values[values > 0]
        keys, which, counts = np.unique(
            np.floor(np.log(above) / _RATIO), return_inverse=True, return_counts=True
        )
        sums = np.bincount(which, above, len(keys))
        for key, count, total in zip(keys.tolist(), counts.tolist(), sums.tolist(), strict=True):
            found = self._bins[int(key)]
            found[0] += count
            found[1] += total
        if above.size < values.size:
            self._bins[None][0] += values.size - above.size

    def bars(self, most: int) -> tuple[list[float], list[int]]:
        """Edges and counts of at most `most` bars, of equal ratio, over all values above zero; without one,
        nothing."""
        keys = [key for key in self._bins if key is not None]
        if not keys:
            return [], []
        width = -(-(max(keys) - min(keys) + 1) // most)
        bars = (max(keys) - min(keys)) // width + 1
        counts = [0] * bars
        for key in keys:
            counts[(key - min(keys)) // width] += int(self._bins[key][0])
        return [math.exp((min(keys) + i * width) * _RATIO) for i in range(bars + 1)], counts

    def quantile(self, share: float) -> float:
        """The value that `share` of all lie below, midway between two where it falls between them."""
        position = share * (self.count - 1)
        low, part = int(position), position % 1
        value = self._ranked(low)
        return value + part * (self._ranked(low + 1) - value) if part else value

    def spread(self) -> dict[str, float] | None:
        """Least, 10 %, median, 90 %, greatest and sum, to three places; None without a value."""
        if not self.count:
            return None
        tenth, median, most = (self.quantile(share) for share in (0.1, 0.5, 0.9))
        found = {
            "min": self.min,
            "p10": tenth,
            "median": median,
            "p90": most,
            "max": self.max,
            "sum": self.sum,
        }
        return {name: round(value, 3) for name, value in found.items()}

    def _ranked(self, rank: int) -> float:
        """The value at a rank from 0, as the mean of its bin."""
        if rank in (0, self.count - 1):
            return self.max if rank else self.min
        for key in sorted(self._bins, key=lambda key: -math.inf if key is None else key):
            count, total = self._bins[key]
            rank -= int(count)
            if rank < 0:
                return total / count
        raise IndexError(rank)
