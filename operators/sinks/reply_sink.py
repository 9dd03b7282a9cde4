"""reply_sink: results to whoever waits for them."""

from __future__ import annotations

from typing import Any

from ...records import TokenDelta
from ...runtime.calls import tell_delta, tell_end
from ...runtime.flow.ledger import outcome_of
from ...runtime.flow.operator import Operator, OperatorConfig, Outlet, Port, RecordKind, operator


@operator("reply_sink")
class ReplySink(Operator[OperatorConfig]):
    """Gives each result back to where its request came from: a connection, an HTTP call, a program's own call.

    Results of requests that nobody waits for, such as lines of a file, end here too. What a caller is told of a request
    that ends without reaching a reply_sink is only how it ended.

    Guarantee: each caller is told exactly one end, and nothing after it.
    """

    inputs = (Port("in", frozenset({RecordKind.DELTA, RecordKind.COMPLETION, RecordKind.DEAD_LETTER})),)
    guarantee = "each caller is told exactly one end; a caller that has gone is told nothing"
    example = """\
operators:
  source: {type: tcp_source, port: 7000}
  reply: {type: reply_sink}
edges:
  - detokenize -> reply
  - "*.error -> reply"
"""

    async def process(self, records: list[Any], out: Outlet) -> None:
        for record in records:
            if isinstance(record, TokenDelta):
                tell_delta(record)
            elif record.request is not None:
                tell_end(record.request, record, outcome_of(record))
