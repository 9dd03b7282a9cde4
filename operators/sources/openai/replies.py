"""What the requests of one call have given so far, and waiting for more of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import anyio

from ....records import Completion
from ....runtime.calls import Caller
from .errors import HTTPError, failure_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ....records import DeadLetter, Request, TokenDelta
    from ....runtime.flow.ledger import Outcome
    from .call import Call


class ClientGoneError(Exception):
    """The client has closed its connection: there is nobody to answer."""


class Reply(Caller):
    """Waits for one request. Its buffer of deltas is bounded by the request's `max_new_tokens`."""

    def __init__(self, replies: Replies, request: Request) -> None:
        self.request = request
        self.deltas: list[TokenDelta] = []
        self.completion: Completion | None = None
        self.failure: HTTPError | None = None
        self._replies = replies

    @property
    def has_ended(self) -> bool:
        return self.completion is not None or self.failure is not None

    def receive_delta(self, delta: TokenDelta) -> None:
        self.deltas.append(delta)
        self._replies.ring()

    def receive_end(self, record: Completion | DeadLetter | None, outcome: Outcome) -> None:
        self.failure = failure_of(record, outcome)
        if self.failure is None and isinstance(record, Completion):
            self.completion = record
        self._replies.count_end(self.failure)


class Replies:
    """The requests of one call: submitted on entering; cancelled on leaving, or when the client goes, where they have
    not ended."""

    def __init__(self, call: Call, requests: Sequence[Request]) -> None:
        self.replies = [Reply(self, request) for request in requests]
        self.failure: HTTPError | None = None  # the first, if there is one
        self._call = call
        self._open = len(requests)
        self.is_silent = False  # for so long that it is time for a sign of life
        self._push: Callable[[], bool] | None = None
        self._pushing = False
        self._error: Exception | None = None  # of a push
        self._quiet = False
        self._news = False
        self._lost = self._cancelled = False
        self._waiter: anyio.Event | None = None

    def __enter__(self) -> Self:
        """Submit the requests.

        Raises:
            HTTPError: one of them is not taken; the others are cancelled.
        """
        call = self._call
        call.service.replies.add(self)
        try:
            for reply in self.replies:
                call.service.submit(reply.request, reply, call.key)
            call.connection.on_lost(self._lose)
        except HTTPError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._push = None
        self._call.connection.on_lost(None)
        self._call.service.replies.discard(self)
        self._cancel()

    @property
    def have_ended(self) -> bool:
        """Whether all have."""
        return not self._open

    def count_end(self, failure: HTTPError | None) -> None:
        """One of the requests has ended."""
        self._open -= 1
        self.failure = self.failure or failure
        self._quiet = False
        self._wake()

    async def news(self) -> None:
        """Wait until there is something new, if only that it is time to show a sign of life.

        Raises:
            ClientGoneError: the client has closed its connection.
        """
        if not self._news:
            self._waiter = anyio.Event()
            try:
                await self._waiter.wait()
            finally:
                self._waiter = None
        self._news = False
        if self._error is not None:
            raise self._error
        if self._lost:
            raise ClientGoneError

    async def completions(self) -> list[Completion]:
        """Wait for the ends of all.

        Raises:
            HTTPError: one of them has failed.
            ClientGoneError: the client has closed its connection.
        """
        while not self.have_ended and self.failure is None:
            await self.news()
        if self.failure is not None:
            raise self.failure
        return [reply.completion for reply in self.replies if reply.completion is not None]

    def push_to(self, push: Callable[[], bool]) -> None:
        """From now on call this when there are new deltas, however many. Where it returns False, `news` has them; it
        has ends at once."""
        self._push = push

    def ring(self) -> None:
        """There is something new."""
        self._quiet = False
        if self._push is None:
            self._wake()
        elif not self._pushing:
            self._pushing = True
            self._call.service.push_soon(self, self._call.connection.loop)

    def poke(self) -> None:
        """Ring, if nobody has since the last time."""
        if self._quiet:
            self.is_silent = True
            self._wake()
        self._quiet = True

    def push_or_wake(self) -> None:
        """Push the news, or let `news` have them."""
        self._pushing = False
        try:
            if self._push is not None and self._push():
                return
        except Exception as error:  # it is this call's, and no other's
            self._push, self._error = None, error
        self._wake()

    def _wake(self) -> None:
        self._news = True
        if self._waiter is not None:
            self._waiter.set()

    def _lose(self) -> None:
        self._lost = True
        self._push = None
        self._cancel()
        self._wake()

    def _cancel(self) -> None:
        if self._cancelled:
            return
        self._cancelled = True
        left = [reply.request for reply in self.replies if not reply.has_ended and reply.request.caller is not None]
        if left:
            self._call.service.cancel(left)
