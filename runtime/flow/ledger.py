"""The ledger: who is in flight. `accepted = done + error + cancelled + shed + in_flight`, at every moment."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from ...errors import FlowError
from ...records import Completion, DeadLetter, FinishReason, Request, TokenDelta

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ...records import Record


class Outcome(StrEnum):
    """How a request ended; later ones are worse, and the worst of a request's copies counts."""

    DONE = "done"
    CANCELLED = "cancelled"
    SHED = "shed"
    ERROR = "error"


_RANK = {outcome: rank for rank, outcome in enumerate(Outcome)}
_OUTCOME_OF = {
    FinishReason.CANCELLED: Outcome.CANCELLED,
    FinishReason.TIMEOUT: Outcome.SHED,
    FinishReason.ERROR: Outcome.ERROR,
}

Settled = list[tuple[Request, Outcome]]


def request_of(record: Record) -> Request | None:
    """The request a record belongs to; None for a line that is no request."""
    if isinstance(record, Request):
        return record
    if isinstance(record, TokenDelta):
        return record.sequence.request
    return record.request


def outcome_of(record: Record) -> Outcome:
    """How a terminal record ends its request."""
    if isinstance(record, Completion):
        return max((_OUTCOME_OF.get(c.finish_reason, Outcome.DONE) for c in record.choices if c.finish_reason),
                   key=_RANK.__getitem__, default=Outcome.DONE)  # fmt: skip
    return Outcome.ERROR if isinstance(record, DeadLetter) else Outcome.DONE


class _Entry:
    __slots__ = ("copies", "request", "worst")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.copies = 1
        self.worst = Outcome.DONE


class Ledger:
    """Counts requests by identity of the Request object: ids are user data and may repeat."""

    def __init__(self) -> None:
        self._open: dict[int, _Entry] = {}
        self._ended = dict.fromkeys(Outcome, 0)
        self._accepted = 0
        self.filtered = 0
        self._listeners: list[Callable[[Settled], None]] = []
        self._failure_listeners: list[Callable[[], None]] = []

    def on_settled(self, listener: Callable[[Settled], None]) -> None:
        """Call `listener` with each list of requests that ended."""
        self._listeners.append(listener)

    def on_failed(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever the error count has grown."""
        self._failure_listeners.append(listener)

    def accept(self, requests: Iterable[Request]) -> None:
        """Requests enter the flow."""
        before = len(self._open)
        self._open.update({id(request): _Entry(request) for request in requests})
        self._accepted += len(self._open) - before

    def accept_failed(self, count: int) -> None:
        """Lines that are no requests: accepted and failed at once."""
        self._accepted += count
        self._ended[Outcome.ERROR] += count
        self._tell_failed()

    def _tell_failed(self) -> None:
        for listener in self._failure_listeners:
            listener()

    def fork(self, request: Request, extra: int) -> None:
        """A record of this request was copied `extra` times: it ends when all copies have."""
        entry = self._open.get(id(request))
        if entry is not None:
            entry.copies += extra

    def settle(self, endings: Iterable[tuple[Request, Outcome]]) -> None:
        """Copies of requests end; of a request that has ended already nothing happens."""
        settled: Settled = []
        errors = self._ended[Outcome.ERROR]
        for request, outcome in endings:
            entry = self._open.get(id(request))
            if entry is None:
                continue
            if _RANK[outcome] > _RANK[entry.worst]:
                entry.worst = outcome
            entry.copies -= 1
            if not entry.copies:
                del self._open[id(request)]
                self._ended[entry.worst] += 1
                settled.append((request, entry.worst))
        if settled:
            for listener in self._listeners:
                listener(settled)
        if self._ended[Outcome.ERROR] > errors:
            self._tell_failed()

    def is_open(self, request: Request) -> bool:
        """Whether the request is in flight."""
        return id(request) in self._open

    def fail_all(self) -> None:
        """Everything in flight ends with an error: the flow is gone."""
        self.settle([(e.request, Outcome.ERROR) for e in list(self._open.values()) for _ in range(e.copies)])

    def counters(self) -> dict[str, int]:
        """`accepted`, one for each outcome, and `in_flight`."""
        ended = {outcome.value: count for outcome, count in self._ended.items()}
        return {"accepted": self._accepted, **ended, "in_flight": len(self._open)}

    @property
    def error_ratio(self) -> float:
        return self._ended[Outcome.ERROR] / self._accepted if self._accepted else 0.0

    @property
    def accepted(self) -> int:
        return self._accepted

    def check(self) -> None:
        """Assert the conservation law.

        Raises:
            FlowError: the counters do not add up.
        """
        if self._accepted != sum(self._ended.values()) + len(self._open):
            raise FlowError(f"the ledger does not balance: {self.counters()}")
