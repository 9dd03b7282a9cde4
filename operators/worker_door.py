"""What prefill and decode have in common: records go into the worker and come back, one list per step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import anyio
from pydantic import AfterValidator, Field, ValidationInfo

from ..records import DeadLetter, Sequence, TokenDelta
from ..runtime.flow.mailbox import Mailbox
from ..runtime.flow.operator import Operator, OperatorConfig, Outlet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def _check_runs_at_once(max_batch: int, info: ValidationInfo) -> int:
    limit = max_batch if info.context is None else info.context.scheduler.max_batch_size
    if max_batch > limit:
        raise ValueError(f"but {limit} run at once; write at most that, or raise engine.scheduler.max_batch_size")
    return max_batch


class WorkerDoorConfig(OperatorConfig):
    """`max_batch` bounds the sequences of one step in this stage; None: as engine.scheduler says."""

    max_batch: Annotated[int, Field(gt=0), AfterValidator(_check_runs_at_once)] | None = None


DoorConfigT = TypeVar("DoorConfigT", bound=WorkerDoorConfig)


class WorkerDoor(Operator[DoorConfigT]):
    """Submits sequences and sends on what comes back, until the inputs have ended and nothing is inside."""

    config_model = WorkerDoorConfig

    def _connect(self, mailbox: Mailbox[Any]) -> None:
        raise NotImplementedError

    def _submit(self, sequences: list[Sequence]) -> None:
        raise NotImplementedError

    async def open(self) -> None:
        self._back: Mailbox[Any] = Mailbox()
        self._inside: set[int] = set()  # by id; what a failed instance has put in comes out here too, but is not ours
        self._ended = False
        self._connect(self._back)

    async def run(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._feed, inlet, out)
            while self._inside or not self._ended:
                await self._hand_on(self._take_ours(await self._back.get()), out)

    async def _feed(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        async for records in inlet:
            ended = [record for record in records if record.ended]
            going_in = [record for record in records if not record.ended] if ended else records
            if ended:
                await self._send(ended, out)
            self._inside.update(map(id, going_in))
            self._submit(going_in)
        self._ended = True
        self._back.put([])

    def _take_ours(self, records: list[Any]) -> list[Any]:
        inside, ours = self._inside, []
        for record in records:
            if isinstance(record, TokenDelta):
                if id(record.sequence) in inside:
                    ours.append(record)
            elif id(record) in inside:
                inside.discard(id(record))
                ours.append(record)
        return ours

    async def _hand_on(self, records: list[Any], out: Outlet) -> None:
        """Send what came back."""
        await self._send(records, out)

    async def _send(self, records: list[Any], out: Outlet) -> None:
        good, letters = [], []
        for record in records:
            if isinstance(record, Sequence) and record.error is not None:
                letters.append(DeadLetter(record.error, src=record.request.src, request=record.request))
            else:
                good.append(record)
        if good:
            await out.send(good)
        if letters:
            await out.reject(letters)

    async def close(self) -> None:
        self._back.close()
