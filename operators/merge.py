"""merge: several streams into one."""

from __future__ import annotations

from typing import Any

from ..runtime.flow.operator import Operator, OperatorConfig, Outlet, Port, operator


@operator("merge")
class Merge(Operator[OperatorConfig]):
    """Passes on what arrives on any of its edges.

    Guarantee: one record out for each record in; the order within each edge is kept, the edges interleave.
    """

    inputs = (Port("in"),)
    outputs = (Port("out", same_as="in"),)
    guarantee = "one record out for each record in; order is kept within an edge"
    example = "merge: {}   # with the edges: first -> merge, second -> merge, merge -> next"

    async def process(self, records: list[Any], out: Outlet) -> None:
        await out.send(records)
