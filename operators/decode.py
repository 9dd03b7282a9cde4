"""decode: extends sequences token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..runtime.flow.operator import ERROR_PORT, Port, RecordKind, operator
from .worker_door import WorkerDoor

if TYPE_CHECKING:
    from ..records import Sequence
    from ..runtime.flow.mailbox import Mailbox


@operator("decode")
class Decode(WorkerDoor):
    """Hands prefilled sequences to the worker; each comes back when all its choices have ended.

    For requests that stream, a TokenDelta for each step and choice comes before that.

    Guarantee: every sequence leaves exactly once, on `out` or `error`, after all its deltas, in the order of ending.
    """

    inputs = (Port("in", frozenset({RecordKind.SEQUENCE})),)
    outputs = (Port("out", frozenset({RecordKind.SEQUENCE, RecordKind.DELTA})), ERROR_PORT)
    requires = frozenset({"prefilled"})
    provides = frozenset({"decoded"})
    single = True  # one worker, one door of each kind
    guarantee = "every sequence leaves exactly once, on `out` or `error`, after all its deltas"
    example = "decode: {max_batch: 8}"

    def _connect(self, mailbox: Mailbox[Any]) -> None:
        worker = self.context.engine.worker
        worker.on_decoded = mailbox.put
        if self.config.max_batch is not None:
            worker.planner.max_decode_batch = self.config.max_batch

    def _submit(self, sequences: list[Sequence]) -> None:
        self.context.engine.worker.submit_decode(sequences)
