"""The two ends of an operator: the inlet it iterates over and the outlet it sends to. Both keep the books."""

from __future__ import annotations

import logging
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import anyio.lowlevel

from ...errors import FlowError
from ...records import Completion, DeadLetter, KVEvent, Request, TokenDelta
from .ledger import Outcome, endings_of, request_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .channel import Channel
    from .custody import Custody
    from .ledger import Ledger
    from .operator import Operator

log = logging.getLogger("sageLLM")

_YIELD_AFTER = 32  # sends in a row that found room, of a source


@dataclass(slots=True)
class NodeStats:
    """Counters of one operator, in records."""

    taken: int = 0
    sent: int = 0
    rejected: int = 0
    dropped: int = 0
    restarts: int = 0
    lost: int = 0  # rejected, but there is no error port to take them


class Inlet:
    """Lists of records until the inputs end. Asking for the next one says that a sink is done with the last one."""

    def __init__(self, channel: Channel, custody: Custody, stats: NodeStats, ledger: Ledger, is_sink: bool) -> None:
        self._channel = channel
        self._custody = custody
        self._stats = stats
        self._ledger = ledger
        self._is_sink = is_sink
        self.last: list[Any] = []
        self.ended = False

    def __aiter__(self) -> Inlet:
        return self

    async def __anext__(self) -> list[Any]:
        if self._is_sink:
            self.settle_sunk()
        self.last = []
        records = await self._channel.receive()
        if not records:
            self.ended = True
            raise StopAsyncIteration
        self._stats.taken += len(records)
        self._custody.take(records)
        self.last = [*records]
        return records

    def settle_sunk(self) -> None:
        """What the sink was given is at its end."""
        self._ledger.settle(endings_of(self._custody.take_all()))

    async def refuse_rest(self) -> int:
        """Take what still arrives, though nobody reads it any more, until the inputs end. Returns how many."""
        count = 0
        while records := await self._channel.receive():
            self._ledger.settle([(request, Outcome.SHED) for request, _ in endings_of(records)])
            count += len(records)
        return count


class PortOutlet:
    """The Outlet of one operator. A send that is cancelled is not lost: `flush` delivers the rest of it."""

    def __init__(
        self,
        name: str,
        operator: Operator[Any],
        channels: dict[str, list[Channel]],
        custody: Custody,
        stats: NodeStats,
        ledger: Ledger,
        fail: Callable[[FlowError], None],
    ) -> None:
        self._name = name
        self._config = operator.config
        self._is_source = not operator.inputs
        self._channels = {port.name: channels.get(port.name, []) for port in operator.outputs} | channels
        self._custody = custody
        self._stats = stats
        self._ledger = ledger
        self._fail = fail
        self._unsent: list[tuple[Channel, list[Any]]] = []
        self._in_a_row = 0
        self._ended = False

    async def send(self, records: Sequence[Any], port: str = "out") -> None:
        """Send to every edge of a port, copies to all but the first; without an edge the records are dropped.

        Raises:
            ValueError: the operator has declared no such port.
            TypeError: something is not a record.
        """
        if port == "error":
            await self.reject(records)
            return
        channels = self._channels.get(port)
        if channels is None:
            known = " or ".join(repr(name) for name in self._channels) or "none at all"
            raise ValueError(f"operator {self._name!r} has no output {port!r}, but {known}: declare it in `outputs`")
        if records and not channels:
            self.drop(records)
            return
        passed = self._pass_on(records)
        if not passed:
            return
        self._stats.sent += len(passed)
        await self._deliver(channels, passed)

    async def reject(self, letters: Sequence[DeadLetter]) -> None:
        """Hand over failed records, as `on_error` says.

        Raises:
            FlowError: `on_error` is `fail`.
            TypeError: something is not a dead letter.
        """
        for letter in letters:
            if not isinstance(letter, DeadLetter):
                raise TypeError(f"a {type(letter).__name__} cannot be rejected: make a DeadLetter of it")
        passed = self._pass_on(letters)
        if not passed:
            return
        self._stats.rejected += len(passed)
        if self._is_source:
            self._ledger.accept_failed(sum(letter.request is None for letter in passed))
        if self._config.on_error == "route" and (channels := self._channels.get("error")):
            await self._deliver(channels, passed)
            return
        self._ledger.settle(endings_of(passed))
        if self._config.on_error == "fail":
            error = FlowError(f"operator {self._name!r}: {passed[0].error} (on_error: fail)")
            self._fail(error)
            raise error
        if self._config.on_error == "route":
            self._stats.lost += len(passed)
            log.warning(
                "operator %r has no error port: %d records are lost: %s", self._name, len(passed), passed[0].error
            )

    def drop(self, records: Sequence[Any]) -> None:
        """Let records end here on purpose: their requests are done, and counted as filtered."""
        passed = self._pass_on(records)
        self._stats.dropped += len(passed)
        self._ledger.settle_filtered(endings_of(passed))

    async def end(self) -> None:
        """Deliver what is left, and let what is downstream end; more than once is no more than once."""
        await self.flush()
        if not self._ended:
            self._ended = True
            for channel in chain.from_iterable(self._channels.values()):
                channel.close_sender()

    async def flush(self) -> None:
        """Deliver what cancelled sends have left."""
        unsent, self._unsent = self._unsent, []
        await self._finish(unsent)

    def _pass_on(self, records: Sequence[Any]) -> list[Any]:
        """Take records out of the operator's custody; returns those that may go on, as a list of our own."""
        strangers = self._custody.release(records)
        if not strangers:
            return [*records]
        refused = self._adopt(strangers)
        return [record for record in records if id(record) not in refused] if refused else [*records]

    def _adopt(self, strangers: Iterable[Any]) -> set[int]:
        """Enter records of requests that the operator had not taken. Returns those of requests that have ended."""
        ledger, refused = self._ledger, set()
        new = []
        for record in strangers:
            request = request_of(record)
            assert request is not None
            if self._is_source or (type(record) is Request and not ledger.is_open(request)):
                new.append(request)
            elif ledger.is_open(request) and not ledger.is_condemned(request):
                ledger.fork(request, 1)
            else:
                refused.add(id(record))
        ledger.accept(new)
        return refused

    async def _deliver(self, channels: list[Channel], records: list[Any]) -> None:
        parcels = [(channel, self._copies(records)) for channel in channels[1:]]
        parcels.insert(0, (channels[0], records))
        if self._unsent:
            parcels = [*self._unsent, *parcels]
            self._unsent = []
        waiting = [(channel, rest) for channel, given in parcels if (rest := channel.offer(given))]
        if waiting:
            self._in_a_row = 0
            await self._finish(waiting)
        elif self._is_source:
            self._in_a_row += 1
            if self._in_a_row >= _YIELD_AFTER:
                self._in_a_row = 0
                await anyio.lowlevel.checkpoint()

    async def _finish(self, parcels: list[tuple[Channel, list[Any]]]) -> None:
        try:
            for channel, rest in parcels:
                await channel.send(rest)
        except BaseException:
            self._unsent += [(channel, rest) for channel, rest in parcels if rest]
            raise

    def _copies(self, records: list[Any]) -> list[Any]:
        copies = []
        for record in records:
            twin = _copy(record)
            if type(record) is Request:
                self._ledger.fork_request(record, twin)
            elif type(record) is not TokenDelta and (request := request_of(record)) is not None:
                self._ledger.fork(request, 1)
            copies.append(twin)
        return copies


def _copy(record: Any) -> Any:
    """A copy that another branch may change: nothing mutable that stages write to is shared."""
    twin = copy(record)
    if isinstance(twin, Request):
        twin.messages = None if twin.messages is None else [{**message} for message in twin.messages]
        twin.prompt_tokens = None if twin.prompt_tokens is None else [*twin.prompt_tokens]
    elif isinstance(twin, Completion):
        twin.choices = [replace(choice, output_tokens=[*choice.output_tokens]) for choice in twin.choices]
        twin.metrics = copy(twin.metrics)
    elif isinstance(twin, TokenDelta):
        twin.tokens = [*twin.tokens]
    elif isinstance(twin, KVEvent):
        twin.block_hashes = [*twin.block_hashes]
    return twin
