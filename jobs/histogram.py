"""Quantiles of any number of values in little memory.

In: values >= 0, one at a time. Out: exact least, greatest and sum; quantiles to 1 %, exact where values
that lie close together are equal (as rates and sizes are). The trade-off: 70 bins per factor of two.
"""

from __future__ import annotations

import math
from collections import defaultdict

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
