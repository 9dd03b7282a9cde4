"""One operator at work: what it takes, what it sends, and what becomes of both when it fails."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ...errors import FlowError
from ...records import DeadLetter, Request, TokenDelta
from .ledger import Outcome, outcome_of, request_of
from .operator import Operator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from .channel import Channel
    from .ledger import Ledger


@dataclass(slots=True)
class NodeStats:
    """Counters of one operator, in records."""

    taken: int = 0
    sent: int = 0
    rejected: int = 0
    dropped: int = 0
    restarts: int = 0


@dataclass(slots=True, eq=False)
class Node:
    """An operator in its place. `make` gives a new instance after a failure."""

    name: str
    make: Callable[[], Operator[Any]]
    operator: Operator[Any]
    ledger: Ledger
    inlet: Channel | None = None
    outlets: dict[str, list[Channel]] = field(default_factory=dict)
    stats: NodeStats = field(default_factory=NodeStats)
    failures: deque[float] = field(default_factory=deque)
    _batch: list[Any] = field(default_factory=list)
    _passed_on: set[int] = field(default_factory=set)
    _held: dict[int, Any] | None = None

    def __post_init__(self) -> None:
        # A stage with a `run` of its own may hold records of many lists; the others only those of the last one.
        if type(self.operator).run is not Operator.run and self.operator.inputs and not self.is_sink:
            self._held = {}

    @property
    def is_source(self) -> bool:
        return not self.operator.inputs

    @property
    def is_sink(self) -> bool:
        return all(port.name == "error" for port in self.operator.outputs)

    # -- taking ------------------------------------------------------------------------------------------------------

    async def records(self) -> AsyncIterator[list[Any]]:
        """The inlet of the operator: lists until the inputs end."""
        if self.inlet is None:
            return
        while True:
            self._consumed()
            batch = await self.inlet.receive()
            if not batch:
                return
            self.stats.taken += len(batch)
            if self._held is None:
                self._batch = batch
            else:
                self._held.update({id(request_of(record)): record for record in batch})
            yield batch

    def _consumed(self) -> None:
        """The last list was processed: a sink's records are at their end."""
        if self.is_sink and self._batch:
            self.ledger.settle(_endings(self._batch))
        self._batch = []
        self._passed_on.clear()

    # -- sending (the Outlet) ----------------------------------------------------------------------------------------

    async def send(self, records: Sequence[Any], port: str = "out") -> None:
        """Send to every edge of a port; copies beyond the first count as further copies of their requests."""
        if not records:
            return
        self.stats.sent += len(records)
        if self.is_source and port == "out":
            self.ledger.accept([record for record in records if isinstance(record, Request)])
        self._let_go(records)
        channels = self.outlets.get(port, ())
        if not channels:
            self.ledger.settle(_endings(records))  # nobody listens to this port, by the pipeline's own choice
            return
        for record in records if len(channels) > 1 else ():
            request = request_of(record)
            if request is not None and not isinstance(record, TokenDelta):
                self.ledger.fork(request, len(channels) - 1)
        # A drain cancels a source while it waits here: what no longer gets in was never begun.
        give_back = self._cancel if self.is_source else None
        for index, channel in enumerate(channels):
            try:
                await channel.send([replace(record) for record in records] if index else records, give_back)
            except BaseException:
                if give_back is not None:
                    give_back(list(records) * (len(channels) - 1 - index))
                raise

    def _cancel(self, records: Sequence[Any]) -> None:
        self.ledger.settle([(request, Outcome.CANCELLED) for request, _ in _endings(records)])

    async def reject(self, letters: Sequence[DeadLetter]) -> None:
        """Hand over failed records, as `on_error` says.

        Raises:
            FlowError: `on_error` is `fail`.
        """
        if not letters:
            return
        self.stats.rejected += len(letters)
        lines = sum(letter.request is None for letter in letters)
        if lines:
            self.ledger.accept_failed(lines)
        if self.is_source:
            self.ledger.accept([letter.request for letter in letters if letter.request is not None])
        choice = self.operator.config.on_error
        if choice == "route":
            self.stats.sent -= len(letters)
            await self.send(letters, "error")
            return
        self._let_go(letters)
        self.ledger.settle(_endings(letters))
        if choice == "fail":
            raise FlowError(f"operator {self.name}: {letters[0].error} (on_error: fail)")

    def drop(self, records: Sequence[Any]) -> None:
        """Records end here without an error: a filter let them go."""
        self.stats.dropped += len(records)
        self.ledger.filtered += len(records)
        self._let_go(records)
        self.ledger.settle(_endings(records))

    def _let_go(self, records: Sequence[Any]) -> None:
        if self._held is not None:
            for record in records:
                if not isinstance(record, TokenDelta):
                    self._held.pop(id(request_of(record)), None)
        elif self._batch:
            self._passed_on.update(id(request_of(record)) for record in records if not isinstance(record, TokenDelta))

    # -- failing -----------------------------------------------------------------------------------------------------

    def take_unfinished(self, error: BaseException) -> list[DeadLetter]:
        """Dead letters for what the operator had taken and not passed on."""
        if self._held is not None:
            left, self._held = list(self._held.values()), {}
        else:
            left = [r for r in self._batch if id(request_of(r)) not in self._passed_on]
            self._batch = []
        text = f"operator {self.name} failed: {type(error).__name__}: {error}"
        letters = []
        for record in left:
            request = request_of(record)
            if request is not None and not isinstance(record, TokenDelta) and self.ledger.is_open(request):
                letters.append(DeadLetter(text, src=request.src, request=request))
        return letters

    def may_restart(self) -> bool:
        """Count a failure; whether the restart policy still allows another instance."""
        policy = self.operator.config.restart
        now = time.monotonic()
        self.failures.append(now)
        while self.failures[0] < now - policy.window_s:
            self.failures.popleft()
        return len(self.failures) <= int(policy.max_restarts)

    def end(self) -> None:
        """No more records come from here."""
        self._consumed()
        for channels in self.outlets.values():
            for channel in channels:
                channel.close_sender()


def _endings(records: Sequence[Any]) -> list[tuple[Request, Outcome]]:
    endings = []
    for record in records:
        request = request_of(record)
        if request is not None and not isinstance(record, TokenDelta):
            endings.append((request, outcome_of(record)))
    return endings
