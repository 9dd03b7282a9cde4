"""Requests from a program's own threads into a running flow, and their results back."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from ..errors import EngineClosedError
from .flow.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from ..records import Completion, DeadLetter, Request, TokenDelta


class Caller(Protocol):
    """Who waits for one request. Called on the flow's thread: must not block."""

    def receive_delta(self, delta: TokenDelta) -> None:
        """A step's new tokens, for requests that stream."""
        ...

    def receive_end(self, record: Completion | DeadLetter) -> None:
        """The terminal record: once, and nothing after it."""
        ...


class FutureCaller:
    """Waits for the terminal record only."""

    def __init__(self) -> None:
        self.future: Future[Completion | DeadLetter] = Future()

    def receive_delta(self, delta: TokenDelta) -> None:
        """Whoever waits for the end reads no deltas."""

    def receive_end(self, record: Completion | DeadLetter) -> None:
        if not self.future.done():
            self.future.set_result(record)


class CallDesk:
    """Pairs requests with their callers. Every caller is told an end, also when the flow dies."""

    def __init__(self) -> None:
        self.arrivals: Mailbox[Request] = Mailbox()
        self._callers: dict[int, tuple[Request, Caller]] = {}
        self._lock = Lock()
        self._closed: str | None = None

    def submit(self, requests: Seq[tuple[Request, Caller]]) -> None:
        """Hand over requests, from any thread.

        Raises:
            EngineClosedError: the flow takes no more.
        """
        with self._lock:
            if self._closed is not None:
                raise EngineClosedError(self._closed)
            self._callers.update({id(request): (request, caller) for request, caller in requests})
        self.arrivals.put([request for request, _ in requests])

    def deliver_delta(self, delta: TokenDelta) -> None:
        """Tell a caller of new tokens; on the flow's thread."""
        entry = self._callers.get(id(delta.sequence.request))
        if entry is not None:
            entry[1].receive_delta(delta)

    def deliver_end(self, request: Request, record: Completion | DeadLetter) -> None:
        """Tell a caller of its end; a second end of the same request is ignored."""
        with self._lock:
            entry = self._callers.pop(id(request), None)
        if entry is not None:
            entry[1].receive_end(record)

    def close(self, reason: str) -> None:
        """Take no more requests; those that are in still get their results."""
        with self._lock:
            self._closed = self._closed or reason
        self.arrivals.close()

    def fail_all(self, reason: str) -> None:
        """End every call that is still open."""
        from ..records import DeadLetter

        self.close(reason)
        with self._lock:
            left, self._callers = list(self._callers.values()), {}
        for request, caller in left:
            caller.receive_end(DeadLetter(reason, request=request))
