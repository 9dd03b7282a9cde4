"""Virtual time: a clock that stands still until the next event."""

from __future__ import annotations

import heapq
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class VirtualTime:
    """A clock in seconds, to be called as `time.monotonic` is, and the events that make it advance.

    Events of one moment happen in the order in which they were asked for, so a run is deterministic.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def __call__(self) -> float:
        return self.now

    def call_at(self, when: float, event: Callable[[], None]) -> None:
        """Let something happen at a moment, now if that has passed."""
        heapq.heappush(self._events, (max(when, self.now), next(self._numbers), event))

    def call_later(self, seconds: float, event: Callable[[], None]) -> None:
        """Let something happen so many seconds from now."""
        self.call_at(self.now + seconds, event)

    def run(self) -> None:
        """Let events happen until there are none."""
        events = self._events
        while events:
            self.now, _, event = heapq.heappop(events)
            event()
