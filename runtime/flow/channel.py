"""Bounded channels that move lists of records: many senders, one receiver."""

from __future__ import annotations

from collections import deque
from typing import Any

import anyio
import anyio.lowlevel

_JOIN_UP_TO = 64  # short lists that wait are received as one
_YIELD_AFTER = 32  # receives in a row that found something waiting


class Channel:
    """At most `capacity` records wait. Senders that find it full take turns, in the order in which they came."""

    def __init__(self, senders: int, capacity: int = 1024) -> None:
        self.capacity = capacity
        self._senders = senders
        self._lists: deque[list[Any]] = deque()
        self._waiting = 0
        self._arrived: anyio.Event | None = None
        self._turns: deque[_Turn] = deque()
        self._in_a_row = 0

    def __len__(self) -> int:
        return self._waiting

    def offer(self, records: list[Any]) -> list[Any]:
        """Take what fits, at once, and return the rest: all of it if others wait. The list is the channel's own now."""
        if self._turns:
            return records
        return self._put(records)

    def _put(self, records: list[Any]) -> list[Any]:
        room = self.capacity - self._waiting
        if room <= 0:
            return records
        rest: list[Any] = []
        if len(records) > room:
            records, rest = records[:room], records[room:]
        self._lists.append(records)
        self._waiting += len(records)
        if self._arrived is not None:
            self._arrived.set()
        return rest

    async def send(self, records: list[Any]) -> None:
        """Queue all records in order, waiting for room.

        They are taken out of the list as they are queued: after a cancelled call it holds what was not.
        """
        turn = _Turn()
        self._turns.append(turn)
        try:
            while records:
                if self._turns[0] is turn:
                    records[:] = self._put(records[:])
                    if not records:
                        return
                await turn.wait()
        finally:
            self._turns.remove(turn)
            self._call_next()

    def _call_next(self) -> None:
        if self._turns and self._waiting < self.capacity:
            self._turns[0].call()

    def close_sender(self) -> None:
        """One sender has ended; the last one ends the channel."""
        self._senders -= 1
        if self._senders <= 0 and self._arrived is not None:
            self._arrived.set()

    async def receive(self) -> list[Any]:
        """The next list that waits; an empty list once every sender has ended and nothing is left.

        Short lists that wait come joined, so a list need not be as it was sent; the order of each sender is kept.
        """
        lists = self._lists
        if lists:
            self._in_a_row += 1
            if self._in_a_row >= _YIELD_AFTER:
                self._in_a_row = 0
                await anyio.lowlevel.checkpoint()
        while not lists:
            if self._senders <= 0:
                return []
            self._in_a_row = 0
            self._arrived = anyio.Event()
            try:
                await self._arrived.wait()
            finally:
                self._arrived = None
            await anyio.lowlevel.checkpoint_if_cancelled()  # asyncio tells nobody whose event is set in every turn
        records = lists.popleft()
        while lists and len(records) + len(lists[0]) <= _JOIN_UP_TO:
            records += lists.popleft()
        self._waiting -= len(records)
        self._call_next()
        return records


class _Turn:
    """A sender's place in the line."""

    __slots__ = ("_called",)

    def __init__(self) -> None:
        self._called = anyio.Event()

    def call(self) -> None:
        self._called.set()

    async def wait(self) -> None:
        await self._called.wait()
        self._called = anyio.Event()
