"""call_source: requests that a program makes through SageLLMEngine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...runtime.flow.operator import Operator, OperatorConfig, Outlet, Port, RecordKind, operator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@operator("call_source")
class CallSource(Operator[OperatorConfig]):
    """Emits the requests that other threads submit to SageLLMEngine, until it is shut down. No file may name it.

    Guarantee: each submitted request is emitted once, in order of submission; at most once, as the caller is gone
    when the process is.
    """

    outputs = (Port("out", frozenset({RecordKind.REQUEST})),)
    guarantee = "at most once: each submitted request once, in order of submission"

    async def run(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        async for requests in self.context.engine.calls.arrivals:
            await out.send(requests)
