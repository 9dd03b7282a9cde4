"""call_sink: results to the program that made the request through SageLLMEngine."""

from __future__ import annotations

from typing import Any

from ...records import DeadLetter, TokenDelta
from ...runtime.flow.operator import Operator, OperatorConfig, Outlet, Port, RecordKind, operator


@operator("call_sink")
class CallSink(Operator[OperatorConfig]):
    """Wakes the caller of each request: deltas as they come, then its end. No file may name it.

    Guarantee: each caller is told exactly one end.
    """

    inputs = (Port("in", frozenset({RecordKind.DELTA, RecordKind.COMPLETION, RecordKind.DEAD_LETTER})),)
    guarantee = "each caller is told exactly one end"

    async def process(self, records: list[Any], out: Outlet) -> None:
        calls = self.context.engine.calls
        for record in records:
            if isinstance(record, TokenDelta):
                calls.deliver_delta(record)
            elif isinstance(record, DeadLetter):
                if record.request is not None:
                    calls.deliver_end(record.request, record)
            else:
                calls.deliver_end(record.request, record)
