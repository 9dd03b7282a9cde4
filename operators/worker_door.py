"""What prefill and decode have in common: records go into the worker and come back, one list per step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from ..records import DeadLetter, Sequence
from ..runtime.flow.mailbox import Mailbox
from ..runtime.flow.operator import Operator, OperatorConfig, Outlet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class WorkerDoor(Operator[OperatorConfig]):
    """Submits sequences and sends on what comes back, until the inputs have ended and nothing is inside."""

    def _connect(self, mailbox: Mailbox[Any]) -> None:
        raise NotImplementedError

    def _submit(self, sequences: list[Sequence]) -> None:
        raise NotImplementedError

    async def open(self) -> None:
        self._back: Mailbox[Any] = Mailbox()
        self._inside = 0
        self._ended = False
        self._connect(self._back)

    async def run(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._feed, inlet, out)
            while not (self._ended and self._inside == 0):
                await self._send(await self._back.get(), out)

    async def _feed(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        async for records in inlet:
            ended = [record for record in records if record.ended]
            going_in = [record for record in records if not record.ended] if ended else records
            if ended:
                await self._send(ended, out, inside=False)
            self._inside += len(going_in)
            self._submit(going_in)
        self._ended = True
        self._back.put([])

    async def _send(self, records: list[Any], out: Outlet, *, inside: bool = True) -> None:
        good, letters, sequences = [], [], 0
        for record in records:
            if isinstance(record, Sequence):
                sequences += 1
                if record.error is not None:
                    letters.append(DeadLetter(record.error, src=record.request.src, request=record.request))
                    continue
            good.append(record)
        if good:
            await out.send(good)
        if letters:
            await out.reject(letters)
        if inside:
            self._inside -= sequences

    async def close(self) -> None:
        self._back.close()
