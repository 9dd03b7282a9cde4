"""Who waits for a request: its caller is told each step's tokens and, once, the end. And the calls of a program."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Lock
from typing import TYPE_CHECKING

from ..errors import EngineClosedError
from ..records import DeadLetter
from .flow.ledger import Outcome
from .flow.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from ..records import Completion, Request, TokenDelta
    from .flow.ledger import Settled


class Caller:
    """Who waits for one request, whose `caller` it is. Told on the flow's thread: must not block."""

    ended = False  # has been told the end; nothing comes after it

    def receive_delta(self, delta: TokenDelta) -> None:
        """A step's new tokens, of requests that stream. Who waits for the end only ignores them."""

    def receive_end(self, record: Completion | DeadLetter | None, outcome: Outcome) -> None:
        """The end. There is no record of what ended elsewhere: in a filter, in another sink."""
        raise NotImplementedError


class FutureCaller(Caller):
    """Waits for the terminal record only."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.future: Future[Completion | DeadLetter] = Future()

    def receive_end(self, record: Completion | DeadLetter | None, outcome: Outcome) -> None:
        if not self.future.done():
            self.future.set_result(record or letter_of(self.request, outcome))


class EndCaller(Caller):
    """Passes the terminal record to a function, which must neither block nor raise."""

    def __init__(self, request: Request, on_end: Callable[[Completion | DeadLetter], None]) -> None:
        self._request, self._on_end = request, on_end

    def receive_end(self, record: Completion | DeadLetter | None, outcome: Outcome) -> None:
        self._on_end(record or letter_of(self._request, outcome))


def letter_of(request: Request, outcome: Outcome) -> DeadLetter:
    """What stands for the record of a request that ended without one."""
    return DeadLetter(f"the request ended with {outcome}", request=request)


def tell_delta(delta: TokenDelta) -> None:
    """Tell a delta to the caller of its request, if there is one and it has not been told the end."""
    caller = delta.sequence.request.caller
    if caller is not None and not caller.ended:
        caller.receive_delta(delta)


def tell_end(request: Request, record: Completion | DeadLetter | None, outcome: Outcome) -> None:
    """Tell a request's caller the end, if there is one; a second end of the same request is ignored."""
    caller = request.caller
    if caller is not None and not caller.ended:
        caller.ended = True
        caller.receive_end(record, outcome)


class CallDesk:
    """Where a program's own requests come in, from any thread. Every caller is told an end, also when the flow dies."""

    def __init__(self) -> None:
        self.arrivals: Mailbox[Request] = Mailbox()
        self._open: dict[int, Request] = {}
        self._lock = Lock()
        self._closed: str | None = None

    def submit(self, requests: Seq[Request]) -> None:
        """Hand over requests that have a caller, from any thread.

        Raises:
            EngineClosedError: the flow takes no more.
        """
        with self._lock:
            if self._closed is not None:
                raise EngineClosedError(self._closed)
            self._open.update({id(request): request for request in requests})
        self.arrivals.put(requests)

    def forget(self, settled: Settled) -> None:
        """These have ended, and their callers know it."""
        with self._lock:
            for request, _ in settled:
                self._open.pop(id(request), None)

    def open_requests(self) -> list[Request]:
        """Those whose callers have not been told an end."""
        with self._lock:
            return [*self._open.values()]

    def close(self, reason: str) -> None:
        """Take no more requests; those that are in still get their results."""
        with self._lock:
            self._closed = self._closed or reason
        self.arrivals.close()

    def fail_all(self, reason: str) -> None:
        """End every call that is still open."""
        self.close(reason)
        with self._lock:
            left, self._open = list(self._open.values()), {}
        for request in left:
            tell_end(request, DeadLetter(reason, request=request), Outcome.ERROR)
