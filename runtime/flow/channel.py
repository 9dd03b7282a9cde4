"""Bounded channels that move lists of records: many senders, one receiver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Channel:
    """At most `capacity` records wait. A list that finds too little room goes in as much as fits, the rest waits."""

    def __init__(self, capacity: int, senders: int) -> None:
        self._capacity = capacity
        self._senders = senders
        self._records: list[Any] = []
        self._arrived = anyio.Event()
        self._room = anyio.Event()

    def __len__(self) -> int:
        return len(self._records)

    async def send(self, records: Sequence[Any], give_back: Callable[[Sequence[Any]], None] | None = None) -> None:
        """Add records in order; waits only while the channel is full. `give_back` gets those that a cancelled wait
        leaves outside."""
        room = self._capacity - len(self._records)
        if len(records) <= room:
            self._records.extend(records)
            self._arrived.set()
            return
        sent = 0
        while sent < len(records):
            room = self._capacity - len(self._records)
            if room <= 0:
                self._room = anyio.Event()
                try:
                    await self._room.wait()
                except BaseException:
                    if give_back is not None:
                        give_back(records[sent:])
                    raise
                continue
            self._records.extend(records[sent : sent + room])
            sent += room
            self._arrived.set()

    def close_sender(self) -> None:
        """One sender has ended; the last one ends the channel."""
        self._senders -= 1
        if not self._senders:
            self._arrived.set()

    async def receive(self) -> list[Any]:
        """Everything that waits, as one list; an empty list once every sender has ended and nothing is left."""
        while not self._records:
            if not self._senders:
                return []
            self._arrived = anyio.Event()
            await self._arrived.wait()
        await anyio.lowlevel.checkpoint()
        records, self._records = self._records, []
        self._room.set()
        return records
