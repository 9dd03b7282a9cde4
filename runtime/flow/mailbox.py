"""A mailbox: lists of items from any thread to one async consumer. `put` never blocks and never waits for the loop."""

from __future__ import annotations

import socket
from collections import deque
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

import anyio
import anyio.lowlevel

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")


class Mailbox(Generic[T]):
    """One consumer, many producers. At most one wake-up is pending, whatever is put meanwhile.

    `across_threads` False is for producers on the consumer's own event loop: waking then costs no system call.
    """

    def __init__(self, *, across_threads: bool = True) -> None:
        self._items: deque[T] = deque()
        self._lock = Lock()
        self._closed = False
        self._rung = False
        self._waiting = False
        self._event: anyio.Event | None = None
        self._bell: tuple[socket.socket, socket.socket] | None = None
        if across_threads:
            self._bell = socket.socketpair()
            for end in self._bell:
                end.setblocking(False)

    def put(self, items: Sequence[T]) -> None:
        """Add items and wake the consumer, also when there are none; after `close` they are dropped."""
        with self._lock:
            if self._closed:
                return
            self._items.extend(items)
            self._ring()

    def close(self) -> None:
        """No more items; the consumer still gets what is there. May be called twice, and by either side."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._ring()
            if not self._waiting:
                self._hang_up()

    def _ring(self) -> None:
        if self._rung:
            return
        self._rung = True
        if self._bell is not None:
            self._bell[1].send(b"\0")
        elif self._event is not None:
            self._event.set()

    def _hang_up(self) -> None:
        if self._bell is not None:
            for end in self._bell:
                end.close()
            self._bell = None

    async def get(self) -> list[T]:
        """Wait for a `put` and return everything there is: an empty list after an empty put, or once closed."""
        await self._wait()
        with self._lock:
            if self._rung and self._bell is not None:
                self._bell[0].recv(1)
            self._rung = False
            self._event = None
            if self._closed:
                self._hang_up()
            items = list(self._items)
            self._items.clear()
        return items

    async def _wait(self) -> None:
        event = anyio.Event()
        with self._lock:
            ready = self._rung or self._closed
            if not ready:
                self._waiting = True
                self._event = event
        if ready:
            await anyio.lowlevel.checkpoint()
            return
        try:
            if self._bell is None:
                await event.wait()
            else:
                await anyio.wait_readable(self._bell[0])
        finally:
            self._waiting = False
            if self._closed:
                with self._lock:
                    self._hang_up()

    def __aiter__(self) -> Mailbox[T]:
        return self

    async def __anext__(self) -> list[T]:
        while not (items := await self.get()):
            if self._closed:
                raise StopAsyncIteration
        return items
