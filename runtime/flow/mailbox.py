"""A mailbox: lists of items from any thread to one async consumer. `put` never blocks and never waits for the loop."""

from __future__ import annotations

import contextlib
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


class Mailbox(Generic[T]):
    """One consumer, many producers. At most one wake-up is pending, whatever is put meanwhile.

    A producer on the consumer's own thread sets an event; another thread asks the consumer's event loop to do so, by
    the loop's own thread-safe call. (A socket pair to wait on wakes no sooner, and costs two descriptors a mailbox.)
    """

    def __init__(self) -> None:
        self._items: list[T] = []
        self._lock = Lock()
        self._closed = False
        self._rung = False
        self._consumer: _Consumer | None = None

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
            self._closed = True
            self._ring()

    @property
    def is_closed(self) -> bool:
        return self._closed

    def _ring(self) -> None:
        self._rung = True
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.wake()

    async def get(self) -> list[T]:
        """Wait for a `put` and return everything there is: an empty list after an empty put, or once closed.

        A cancelled call takes nothing.
        """
        while True:
            with self._lock:
                if self._rung or self._closed:
                    items, self._items = self._items, []
                    self._rung = False
                    return items
                consumer = self._consumer = _Consumer()
            try:
                await consumer.rung.wait()
            finally:
                self._consumer = None
            await anyio.lowlevel.checkpoint_if_cancelled()  # asyncio tells nobody whose event is set in every turn

    def __aiter__(self) -> Mailbox[T]:
        return self

    async def __anext__(self) -> list[T]:
        while not (items := await self.get()):
            if self._closed:
                raise StopAsyncIteration
        return items


class _Consumer:
    """Somebody who waits, and how to wake them from here."""

    __slots__ = ("_schedule", "_thread", "rung")

    def __init__(self) -> None:
        self.rung = anyio.Event()
        self._thread = get_ident()
        loop: Any = anyio.lowlevel.current_token().native_token
        self._schedule: Callable[[Callable[[], None]], object]
        self._schedule = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon

    def wake(self) -> None:
        if get_ident() == self._thread:
            self.rung.set()
            return
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the consumer with it
            self._schedule(self.rung.set)
