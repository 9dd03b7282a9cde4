"""decode: extends sequences token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
from pydantic import Field

from ..runtime.flow.mailbox import Mailbox
from ..runtime.flow.operator import ERROR_PORT, Port, RecordKind, operator
from .delta_pace import DeltaPace
from .worker_door import WorkerDoor, WorkerDoorConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ..kv_runtime.events import KVEventLog
    from ..records import Sequence
    from ..runtime.flow.operator import Outlet


class DecodeConfig(WorkerDoorConfig):
    """`max_batch` as in prefill. The events of at most `max_event_blocks` KV blocks wait for whoever reads `events`."""

    max_event_blocks: int = Field(default=65_536, gt=0)


@operator("decode")
class Decode(WorkerDoor[DecodeConfig]):
    """Hands prefilled sequences to the worker; each comes back when all its choices have ended.

    For requests that stream, TokenDeltas with the new tokens of a choice come before that: one for each step, or one
    for several where steps follow each other faster than their deltas are passed on.

    `events`, if an edge leaves it, tells what each worker's prefix cache stores, removes and moves, from before the
    first request until after the last; unwired it costs nothing. A slow reader never holds up the worker: what it does
    not read in time is lost, and one event says how much that was.

    Guarantee: every sequence leaves exactly once, on `out` or `error`, after all its deltas, in the order of ending.
    Events: in order, each at most once, with numbers in which what was lost is missing.
    """

    config_model = DecodeConfig

    inputs = (Port("in", frozenset({RecordKind.SEQUENCE})),)
    outputs = (
        Port("out", frozenset({RecordKind.SEQUENCE, RecordKind.DELTA})),
        Port("events", frozenset({RecordKind.KV_EVENT}), optional=True, setting="max_event_blocks"),
        ERROR_PORT,
    )
    requires = frozenset({"prefilled"})
    provides = frozenset({"decoded"})
    single = True  # one worker, one door of each kind
    guarantee = "every sequence leaves exactly once, on `out` or `error`, after all its deltas"
    example = """\
operators:
  decode: {max_batch: 8}
  cached: {type: jsonl_sink, path: kv_events.jsonl}
edges:
  - decode.events -> cached
"""

    def _connect(self, mailbox: Mailbox[Any]) -> None:
        worker = self.context.engine.worker
        worker.on_decoded = mailbox.put
        if self.config.max_batch is not None:
            worker.limit_decode(self.config.max_batch)

    async def open(self) -> None:
        """Connect to the worker, and to its cache if somebody reads the events."""
        await super().open()
        self._pace = DeltaPace(on_rested=lambda: self._back.put([]))
        self._rung: Mailbox[None] = Mailbox()
        self._logs = self._listen() if "events" in self.context.wired else []

    def _listen(self) -> list[KVEventLog]:
        """The logs that a failed instance began, or new ones, one for each worker."""
        from ..kv_runtime.events import KVEventLog

        logs: list[KVEventLog] = self.context.kept.setdefault("events", [])
        if not logs:
            for worker, kv in enumerate(self.context.engine.kv_caches):
                logs.append(KVEventLog(kv.num_blocks, kv.block_size, self.config.max_event_blocks, worker))
                kv.listen(logs[-1])
            for tiers, log in zip(self.context.engine.tiers, logs, strict=False):  # in the workers' order
                tiers.listen(log)
        for log in logs:
            log.wake = lambda: self._rung.put([])
        return logs

    async def run(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        async with anyio.create_task_group() as self._tasks:
            if self._logs:
                self._tasks.start_soon(self._send_events, out)
            await super().run(inlet, out)
            self._rung.close()

    async def _hand_on(self, records: list[Any], out: Outlet) -> None:
        going = self._pace.take(records)
        if self._pace.is_due:
            going += self._pace.release()
            self._tasks.start_soon(self._pace.rest)
        await self._send(going, out)

    async def _send_events(self, out: Outlet) -> None:
        ended = False
        while not ended:
            ended = self._rung.is_closed
            await out.send([event for log in self._logs for event in log.take()], "events")
            await self._rung.get()

    def _submit(self, sequences: list[Sequence]) -> None:
        self.context.engine.worker.submit_decode(sequences)
