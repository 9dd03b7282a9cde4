"""tee: every record to several places."""

from __future__ import annotations

from typing import Any

from ..runtime.flow.operator import Operator, OperatorConfig, Outlet, Port, operator


@operator("tee")
class Tee(Operator[OperatorConfig]):
    """Sends every record along each of its edges; the second and further edges get shallow copies.

    A request has ended when all copies have; the worst of their outcomes counts.

    Guarantee: each record once on every edge, in order. The slowest edge sets the pace.
    """

    inputs = (Port("in"),)
    outputs = (Port("out", same_as="in"),)
    guarantee = "each record once on every edge, in order; the slowest edge sets the pace"
    example = "tee: {}   # with the edges: tee -> first, tee -> second"

    async def process(self, records: list[Any], out: Outlet) -> None:
        await out.send(records)
