"""What is to be written to one connection, in the order in which it was put."""

from __future__ import annotations

from collections import deque

import anyio

_CHUNK_BYTES = 1 << 16


class Outbox:
    """Bytes from whoever has something to say, which never wait, to one writer."""

    def __init__(self) -> None:
        self._parts: deque[bytes] = deque()
        self._changed = anyio.Event()
        self._taken = anyio.Event()
        self.closed = False
        self.size = 0  # bytes that wait

    def put(self, data: bytes) -> None:
        """Add bytes; once closed they are dropped."""
        if data and not self.closed:
            self._parts.append(data)
            self.size += len(data)
            self._changed.set()

    def close(self) -> None:
        """Nothing more comes; the writer still gets what is there."""
        self.closed = True
        self._changed.set()

    async def take(self) -> bytes:
        """Wait for something, and return about 64 KiB of it at most; empty when closed and at its end."""
        while not self._parts and not self.closed:
            self._changed = anyio.Event()
            await self._changed.wait()
        taken: list[bytes] = []
        size = 0
        while self._parts and (not taken or size + len(self._parts[0]) <= _CHUNK_BYTES):
            part = self._parts.popleft()
            if len(part) > _CHUNK_BYTES:
                self._parts.appendleft(part[_CHUNK_BYTES:])
                part = part[:_CHUNK_BYTES]
            taken.append(part)
            size += len(part)
        self.size -= size
        self._taken.set()
        return b"".join(taken)

    async def room(self, limit: int) -> None:
        """Wait until no more than `limit` bytes wait."""
        while self.size > limit and not self.closed:
            self._taken = anyio.Event()
            await self._taken.wait()
