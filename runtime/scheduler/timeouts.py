"""Timeouts: when a request that somebody waits for is given up, and as what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ...records import FinishReason

if TYPE_CHECKING:
    from ...config import SchedulerConfig
    from ...records import Sequence


class End(NamedTuple):
    """When a sequence ends if nothing happens to it before, in monotonic seconds, and with what finish reason."""

    at: float
    reason: FinishReason


NEVER = End(float("inf"), FinishReason.TIMEOUT)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """In seconds, 0 is no limit. They hold for interactive requests: lines of a file wait as long as it takes."""

    queue_s: float
    first_token_s: float
    request_s: float

    @classmethod
    def of(cls, config: SchedulerConfig) -> Timeouts:
        """The configured ones."""
        return cls(config.queue_timeout_s, config.first_token_timeout_s, config.request_timeout_s)

    def end_of_waiting(self, sequence: Sequence) -> End:
        """For a sequence that has no lease yet."""
        if not sequence.request.interactive:
            return NEVER
        queued = sequence.timings.queued or 0.0
        return min(_end(queued, self.queue_s, FinishReason.QUEUE_TIMEOUT), self.end_of_running(sequence))

    def end_of_running(self, sequence: Sequence) -> End:
        """For a sequence that has a lease."""
        if not sequence.request.interactive:
            return NEVER
        arrival = sequence.request.arrival
        end = _end(arrival, self.request_s, FinishReason.TIMEOUT)
        if sequence.timings.first_token is None:
            end = min(end, _end(arrival, self.first_token_s, FinishReason.FIRST_TOKEN_TIMEOUT))
        return end


def _end(start: float, limit_s: float, reason: FinishReason) -> End:
    return End(start + limit_s, reason) if limit_s else NEVER
