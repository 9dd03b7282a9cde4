"""tee: every record to several places."""

from __future__ import annotations

from typing import Any

from ..graph.operator_spec import ANY_KIND
from ..runtime.flow.operator import Operator, OperatorConfig, Outlet, Port, RecordKind, operator


@operator("tee")
class Tee(Operator[OperatorConfig]):
    """Sends every record along each of its edges: the first gets it, the others copies that they may change.

    A request has ended when all copies have; the worst of their outcomes counts. Sequences own KV blocks and cannot be
    copied: branch before `tokenize`, or behind `detokenize`.

    Guarantee: each record once on every edge, in order. The slowest edge sets the pace.
    """

    inputs = (Port("in", ANY_KIND - {RecordKind.SEQUENCE}),)
    outputs = (Port("out", same_as="in"),)
    guarantee = "each record once on every edge, in order; the slowest edge sets the pace"
    example = "tee: {}   # with the edges: tee -> first, tee -> second"

    async def process(self, records: list[Any], out: Outlet) -> None:
        await out.send(records)
