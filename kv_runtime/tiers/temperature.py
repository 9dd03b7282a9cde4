"""How hot a block is: by how often, and how long ago, prompts asked for it."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .block_key import BlockKey

WINDOW_S = 10.0  # over which accesses are averaged


class Temperature(StrEnum):
    """What migration makes of a block."""

    HOT = "hot"
    WARM = "warm"
    COLD = "cold"


class _Record:
    __slots__ = ("at", "key", "rate")

    def __init__(self, key: BlockKey, at: float) -> None:
        self.key = key
        self.at = at  # of the last access
        self.rate = 1 / WINDOW_S  # then, in accesses per second


class TemperatureClassifier:
    """Hot from `hot_threshold` accesses a second on, cold after `cold_timeout_s` seconds without one, else warm.

    The rate is an exponentially weighted average over `WINDOW_S` seconds: one number per block. `clock` gives seconds.
    """

    def __init__(self, hot_threshold: float, cold_timeout_s: float, clock: Callable[[], float]) -> None:
        self._hot_threshold = hot_threshold
        self._cold_timeout_s = cold_timeout_s
        self._clock = clock
        self._records: dict[bytes, _Record] = {}

    def access(self, keys: Iterable[BlockKey]) -> None:
        """A prompt asks for these blocks now."""
        records, now = self._records, self._clock()
        for key in keys:
            record = records.get(key.digest)
            if record is None:
                records[key.digest] = _Record(key, now)
            else:
                record.rate = record.rate * math.exp((record.at - now) / WINDOW_S) + 1 / WINDOW_S
                record.at = now

    def classify(self, digest: bytes) -> Temperature:
        """The temperature of a block now; what nobody has asked for is cold."""
        record = self._records.get(digest)
        return Temperature.COLD if record is None else self._classify(record, self._clock())

    def _classify(self, record: _Record, now: float) -> Temperature:
        idle = now - record.at
        if idle >= self._cold_timeout_s:
            return Temperature.COLD
        hot = record.rate * math.exp(-idle / WINDOW_S) >= self._hot_threshold
        return Temperature.HOT if hot else Temperature.WARM

    def last_access(self, digest: bytes) -> float:
        """When a block was asked for last; minus infinity if never."""
        record = self._records.get(digest)
        return float("-inf") if record is None else record.at

    def known_keys(self) -> list[BlockKey]:
        """The blocks that were asked for, but those that were forgotten."""
        return [record.key for record in list(self._records.values())]

    def hot_keys(self) -> list[BlockKey]:
        """The blocks that are hot now."""
        now = self._clock()
        records = list(self._records.values())
        return [record.key for record in records if self._classify(record, now) is Temperature.HOT]

    def key(self, digest: bytes) -> BlockKey | None:
        """The name that goes with a hash, if somebody has asked for it."""
        record = self._records.get(digest)
        return None if record is None else record.key

    def forget_cold(self) -> None:
        """Cold blocks need no record: they are cold without."""
        now = self._clock()
        for digest, record in list(self._records.items()):
            if self._classify(record, now) is Temperature.COLD:
                self._records.pop(digest, None)
