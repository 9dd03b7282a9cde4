"""Distributions in bounded memory: Prometheus buckets for scrapers, and quantiles to 1 % for people."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

_GAMMA = 1.02  # each logarithmic bin is 2 % wide, so its middle is within 1 % of every value in it
_LOG_GAMMA = math.log(_GAMMA)
_BINS_TO_ONE = math.ceil(math.log(1e9) / _LOG_GAMMA)  # from 1e-9 to 1; as many again from 1 to 1e9
_PENDING = 4096  # values kept until they are counted all at once


class Histogram:
    """Counts values >= 0; those outside 1e-9 to 1e9 count as the nearest of the two in quantiles."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._pending: list[float] = []
        self._sum = 0.0
        self._maximum = 0.0
        self._buckets: NDArray[np.int64] | None = None  # per bound, and one for the rest
        self._bins: NDArray[np.int64] | None = None

    def observe(self, value: float, times: int = 1) -> None:
        if times == 1:
            self._pending.append(value)
        else:
            self._pending += [value] * times
        if len(self._pending) >= _PENDING:
            self._fold()

    def observe_all(self, values: Iterable[float]) -> None:
        self._pending += values
        if len(self._pending) >= _PENDING:
            self._fold()

    def add(self, other: Histogram) -> None:
        """Count everything that `other`, of the same bounds, has counted."""
        for ours, theirs in zip(self._fold(), other._fold(), strict=True):
            ours += theirs
        self._sum += other._sum
        self._maximum = max(self._maximum, other._maximum)

    @property
    def count(self) -> int:
        buckets, _ = self._fold()
        return int(buckets.sum())

    @property
    def sum(self) -> float:
        self._fold()
        return self._sum

    @property
    def maximum(self) -> float:
        self._fold()
        return self._maximum

    @property
    def mean(self) -> float:
        return self.sum / max(self.count, 1)

    def quantile(self, q: float) -> float:
        """The value that a share `q` of the values does not exceed, within 1 %; 0 if there are none."""
        _, bins = self._fold()
        seen = bins.cumsum()
        if not seen[-1]:
            return 0.0
        index = int(seen.searchsorted(max(1, math.ceil(q * int(seen[-1]))))) - _BINS_TO_ONE
        return min(float(2 * _GAMMA**index / (1 + _GAMMA)), self._maximum)

    def summary(self) -> dict[str, float]:
        """A few figures: how many values, their mean, median and 99th percentile."""
        return {"count": self.count, "mean": self.mean, "p50": self.quantile(0.5), "p99": self.quantile(0.99)}

    def expose(self, name: str) -> list[str]:
        """The samples of Prometheus' text format."""
        buckets, _ = self._fold()
        lines = [
            f'{name}_bucket{{le="{"+Inf" if bound == math.inf else bound}"}} {seen}'
            for bound, seen in zip((*self._bounds, math.inf), buckets.cumsum().tolist(), strict=True)
        ]
        return [*lines, f"{name}_sum {self._sum}", f"{name}_count {self.count}"]

    def _fold(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Count what is pending; return the buckets and the bins."""
        import numpy as np

        if self._buckets is None or self._bins is None:
            self._buckets = np.zeros(len(self._bounds) + 1, np.int64)
            self._bins = np.zeros(2 * _BINS_TO_ONE + 1, np.int64)
        if self._pending:
            values = np.array(self._pending)
            self._pending.clear()
            self._sum += float(values.sum())
            self._maximum = max(self._maximum, float(values.max()))
            places = np.searchsorted(self._bounds, values)
            self._buckets += np.bincount(places, minlength=len(self._buckets))
            indices = np.ceil(np.log(np.clip(values, 1e-9, 1e9)) / _LOG_GAMMA).astype(np.int64) + _BINS_TO_ONE
            self._bins += np.bincount(indices, minlength=len(self._bins))
        return self._buckets, self._bins
