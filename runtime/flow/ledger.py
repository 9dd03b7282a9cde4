"""The ledger: who is in flight. `accepted = done + error + cancelled + shed + in_flight`, at every moment."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from ...errors import FlowError
from ...records import Completion, DeadLetter, FinishReason, Request, Sequence, TokenDelta

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
    FinishReason.QUEUE_TIMEOUT: Outcome.SHED,
    FinishReason.FIRST_TOKEN_TIMEOUT: Outcome.SHED,
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
    """How a record ends its request, when it goes no further."""
    if isinstance(record, Completion):
        worst = Outcome.DONE
        for choice in record.choices:
            outcome = _OUTCOME_OF.get(choice.finish_reason, Outcome.DONE)  # type: ignore[arg-type]
            if outcome is not Outcome.DONE:
                worst = _worse(worst, outcome)
        return worst
    if isinstance(record, DeadLetter):
        return Outcome.CANCELLED if record.request is not None and record.request.cancelled else Outcome.ERROR
    if isinstance(record, Sequence):
        if record.error is not None:
            return Outcome.ERROR
        return Outcome.CANCELLED if record.request.cancelled else Outcome.DONE
    return Outcome.DONE


def endings_of(records: Iterable[Record]) -> Settled:
    """The requests that end when these records do; a TokenDelta ends none."""
    endings: Settled = []
    for record in records:
        if not isinstance(record, TokenDelta):
            request = request_of(record)
            if request is not None:
                endings.append((request, outcome_of(record)))
    return endings


class _Family:
    """A request that has been copied."""

    __slots__ = ("open", "root", "worst")

    def __init__(self, root: Request) -> None:
        self.root = root
        self.open = {id(root): root}  # the Request objects whose branches have not ended, by id
        self.worst = Outcome.DONE


class _Branch:
    """One Request object of a family, and the records that carry it."""

    __slots__ = ("family", "records", "request", "worst")

    def __init__(self, request: Request, family: _Family) -> None:
        self.request = request
        self.family = family
        self.records = 1
        self.worst = Outcome.DONE


class Ledger:
    """Counts requests by the identity of their Request objects: ids are user data and may repeat.

    A request counts as ended when every copy of it has. Only for the flow's own thread, but for `counters`.
    """

    def __init__(self) -> None:
        self._open: dict[int, Request | _Family] = {}
        self._branches: dict[int, _Branch] = {}  # only of requests that have been copied
        self._condemned: set[int] = set()
        self._ended = dict.fromkeys(Outcome, 0)
        self.accepted = 0
        self.filtered = 0  # of those done: left out on purpose
        self._listeners: list[Callable[[Settled], None]] = []
        self._end_listeners: list[Callable[[Settled], None]] = []
        self._failure_listeners: list[Callable[[], None]] = []

    # -- listeners ---------------------------------------------------------------------------------------------------

    def on_settled(self, listener: Callable[[Settled], None]) -> None:
        """Call `listener` with each list of requests that ended; of a copied request with each Request object."""
        self._listeners.append(listener)

    def on_ended(self, listener: Callable[[Settled], None]) -> None:
        """As `on_settled`, but of a copied request once, when all its copies have ended, with the worst outcome."""
        self._end_listeners.append(listener)

    def on_failed(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever the error count has grown."""
        self._failure_listeners.append(listener)

    def _tell_failed(self) -> None:
        for listener in self._failure_listeners:
            listener()

    # -- entering ----------------------------------------------------------------------------------------------------

    def accept(self, requests: Iterable[Request]) -> None:
        """Requests enter the flow; one that is in flight already is one more record of the same request."""
        entries = self._open
        for request in requests:
            key = id(request)
            if key in entries or key in self._branches:
                self.fork(request, 1)
            else:
                entries[key] = request
                self.accepted += 1

    def accept_failed(self, count: int) -> None:
        """Lines that are no requests: accepted and failed at once."""
        self.accepted += count
        self._ended[Outcome.ERROR] += count
        if count:
            self._tell_failed()

    def accept_shed(self, count: int) -> None:
        """Requests that were refused for want of room: accepted and shed at once."""
        self.accepted += count
        self._ended[Outcome.SHED] += count

    def fork(self, request: Request, extra: int) -> None:
        """There are `extra` more records of this request: it ends when all have."""
        branch = self._branch_of(request)
        if branch is not None:
            branch.records += extra

    def fork_request(self, request: Request, copy: Request) -> None:
        """The Request object itself was copied: the request ends when the records of both objects have."""
        branch = self._branch_of(request)
        if branch is not None:
            branch.family.open[id(copy)] = copy
            self._branches[id(copy)] = _Branch(copy, branch.family)

    def _branch_of(self, request: Request) -> _Branch | None:
        key = id(request)
        branch = self._branches.get(key)
        if branch is None and self._open.get(key) is request:
            family = self._open[key] = _Family(request)
            branch = self._branches[key] = _Branch(request, family)
        return branch

    # -- ending ------------------------------------------------------------------------------------------------------

    def settle(self, endings: Iterable[tuple[Request, Outcome]]) -> None:
        """Records end, and with the last of them their request; to one that has ended already nothing happens."""
        settled: Settled = []
        whole: Settled = []
        entries, ended, condemned = self._open, self._ended, self._condemned
        errors = ended[Outcome.ERROR]
        for request, outcome in endings:
            key = id(request)
            if entries.get(key) is request:
                del entries[key]
                ended[outcome] += 1
                settled.append((request, outcome))
                whole.append((request, outcome))
                if condemned:
                    condemned.discard(key)
            elif key in self._branches:
                self._settle_branch(self._branches[key], outcome, settled, whole)
        if settled:
            for listener in self._listeners:
                listener(settled)
        if whole:
            for listener in self._end_listeners:
                listener(whole)
        if ended[Outcome.ERROR] > errors:
            self._tell_failed()

    def _settle_branch(self, branch: _Branch, outcome: Outcome, settled: Settled, whole: Settled) -> None:
        branch.worst = _worse(branch.worst, outcome)
        branch.records -= 1
        if branch.records:
            return
        key, family = id(branch.request), branch.family
        settled.append((branch.request, branch.worst))
        del self._branches[key]
        self._condemned.discard(key)
        family.worst = _worse(family.worst, branch.worst)
        del family.open[key]
        if not family.open:
            del self._open[id(family.root)]
            self._ended[family.worst] += 1
            whole.append((family.root, family.worst))

    def settle_filtered(self, endings: Settled) -> None:
        """Records were left out on purpose."""
        self.filtered += sum(outcome is Outcome.DONE for _, outcome in endings)
        self.settle(endings)

    def condemn(self, requests: Iterable[Request]) -> None:
        """Failed by the runtime: their dead letters are on the way, and no other record of them may go on."""
        self._condemned.update(id(request) for request in requests if self.is_open(request))

    def is_condemned(self, request: Request) -> bool:
        """Whether only a dead letter of this request may still flow."""
        return id(request) in self._condemned

    def is_open(self, request: Request) -> bool:
        """Whether the request is in flight."""
        return self._open.get(id(request)) is request or id(request) in self._branches

    def copies_of(self, request: Request) -> list[Request]:
        """The Request objects in flight that stand for the same request as this one, itself included."""
        branch, entry = self._branches.get(id(request)), self._open.get(id(request))
        if entry is request:
            return [request]
        family = entry if branch is None else branch.family
        return [*family.open.values()] if isinstance(family, _Family) else []

    def is_copied(self, request: Request) -> bool:
        """Whether more records than one carry the request, or have."""
        return id(request) in self._branches

    def fail_all(self, outcome: Outcome = Outcome.ERROR) -> None:
        """Everything in flight ends: the flow is gone."""
        whole = [(entry, outcome) for entry in self._open.values() if isinstance(entry, Request)]
        copied = [(branch.request, outcome) for branch in self._branches.values() for _ in range(branch.records)]
        self.settle(whole + copied)

    # -- the books ---------------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """`accepted`, one for each outcome, `in_flight`, and `filtered`, which is part of `done`."""
        ended = {outcome.value: count for outcome, count in self._ended.items()}
        return {"accepted": self.accepted, **ended, "in_flight": len(self._open), "filtered": self.filtered}

    @property
    def error_ratio(self) -> float:
        return self._ended[Outcome.ERROR] / self.accepted if self.accepted else 0.0

    def check(self) -> None:
        """Assert the conservation law.

        Raises:
            FlowError: the counters do not add up.
        """
        if self.accepted != sum(self._ended.values()) + len(self._open):
            raise FlowError(f"the ledger does not balance: {self.counters()}")


def _worse(one: Outcome, other: Outcome) -> Outcome:
    return one if _RANK[one] >= _RANK[other] else other
