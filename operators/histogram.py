"""Distributions in bounded memory: Prometheus buckets for scrapers, and quantiles to 1 % for people."""

from __future__ import annotations

import math
from bisect import bisect_left

_GAMMA = 1.02  # each logarithmic bin is 2 % wide, so its middle is within 1 % of every value in it
_LOG_GAMMA = math.log(_GAMMA)
_SMALLEST = 1e-9  # what is smaller counts as this: the number of bins is bounded


class Histogram:
    """Values >= 0. Takes about 1,500 bins for values from a microsecond to a month, whatever their number."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.count = 0
        self.sum = 0.0
        self.maximum = 0.0
        self._bounds = bounds
        self._buckets = [0] * (len(bounds) + 1)
        self._bins: dict[int, int] = {}

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.count += times
        self.sum += value * times
        self.maximum = max(self.maximum, value)
        self._buckets[bisect_left(self._bounds, value)] += times
        index = math.ceil(math.log(max(value, _SMALLEST)) / _LOG_GAMMA)
        self._bins[index] = self._bins.get(index, 0) + times

    def quantile(self, q: float) -> float:
        """The value that a share `q` of the values does not exceed, within 1 %; 0 if there are none."""
        rank = max(1, math.ceil(q * self.count))
        seen = 0
        for index in sorted(self._bins):
            seen += self._bins[index]
            if seen >= rank:
                return min(2 * _GAMMA**index / (1 + _GAMMA), self.maximum)
        return 0.0

    def expose(self, name: str) -> list[str]:
        """The samples of Prometheus' text format."""
        lines = []
        seen = 0
        for bound, bucket in zip((*self._bounds, math.inf), self._buckets, strict=True):
            seen += bucket
            lines.append(f'{name}_bucket{{le="{"+Inf" if bound == math.inf else bound}"}} {seen}')
        return [*lines, f"{name}_sum {self.sum}", f"{name}_count {self.count}"]
