"""prefill: computes prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..runtime.flow.operator import ERROR_PORT, Port, RecordKind, operator
from .worker_door import WorkerDoor, WorkerDoorConfig

if TYPE_CHECKING:
    from ..records import Sequence
    from ..runtime.flow.mailbox import Mailbox

_SEQUENCE = frozenset({RecordKind.SEQUENCE})


@operator("prefill")
class Prefill(WorkerDoor[WorkerDoorConfig]):
    """Hands leased sequences to the worker; each comes back when its prompt is computed and its first token chosen.

    Guarantee: every sequence leaves exactly once, on `out` or `error`, in the order in which prompts are finished.
    """

    inputs = (Port("in", _SEQUENCE),)
    outputs = (Port("out", _SEQUENCE), ERROR_PORT)
    requires = frozenset({"leased"})
    provides = frozenset({"prefilled"})
    single = True  # one worker, one door of each kind
    guarantee = "every sequence leaves exactly once, on `out` or `error`"
    example = "prefill: {max_batch: 8}"

    def _connect(self, mailbox: Mailbox[Any]) -> None:
        worker = self.context.engine.worker
        worker.on_prefilled = mailbox.put
        if self.config.max_batch is not None:
            worker.limit_prefill(self.config.max_batch)

    def _submit(self, sequences: list[Sequence]) -> None:
        self.context.engine.worker.submit_prefill(sequences)
