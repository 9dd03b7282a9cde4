"""Virtual time: a clock that stands still until the next event."""

from __future__ import annotations

import heapq
import sys
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .virtual_thread import VirtualThread


LAST = sys.maxsize


class VirtualTime:
    """A clock in seconds, to be called as `time.monotonic` is, and the events that make it advance.

    Events of one moment happen by rank, of one rank in the order in which they were asked for, so a run is
    deterministic.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.running: VirtualThread | None = None
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._numbers = count()
        self._ranks = count()

    def __call__(self) -> float:
        return self.now

    def take_rank(self) -> int:
        """A rank before `LAST` that nobody else has, after those that were taken before."""
        return next(self._ranks)

    def call_at(self, when: float, event: Callable[[], None], rank: int = LAST) -> None:
        """Let something happen at a moment, now if that has passed."""
        heapq.heappush(self._events, (max(when, self.now), rank, next(self._numbers), event))

    def call_later(self, seconds: float, event: Callable[[], None]) -> None:
        """Let something happen so many seconds from now."""
        self.call_at(self.now + seconds, event)

    def sleep_until(self, moment: float) -> None:
        """Let the virtual thread that runs wait. Where none does, nobody can: nothing happens."""
        if self.running is not None:
            self.running.sleep_until(moment)

    def run(self) -> None:
        """Let events happen until there are none."""
        events = self._events
        while events:
            self.now, _, _, event = heapq.heappop(events)
            event()
