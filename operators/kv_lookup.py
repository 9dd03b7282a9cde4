"""kv_lookup: how much of a prompt's KV is cached already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..runtime.flow.operator import Operator, OperatorConfig, Outlet, Port, RecordKind, operator
from ..runtime.scheduler.lease import PrefixHint, namespace_of

if TYPE_CHECKING:
    from ..records import Sequence

_SEQUENCE = frozenset({RecordKind.SEQUENCE})


@operator("kv_lookup")
class KVLookup(Operator[OperatorConfig]):
    """Looks each prompt up in the prefix tree, keeps what it hits warm, and lets `schedule` reuse it.

    Without this stage no cached prefix is reused. The hit counts when the lease is granted: until then more of the
    prefix may have been computed, or have been evicted.

    Guarantee: one record out for each record in, in order.
    """

    inputs = (Port("in", _SEQUENCE),)
    outputs = (Port("out", _SEQUENCE),)
    requires = frozenset({"tokenized"})
    provides = frozenset({"looked_up"})
    guarantee = "one record out for each record in, in order"
    example = "kv_lookup: {}"

    async def process(self, records: list[Any], out: Outlet) -> None:
        kv = self.context.engine.kv
        found: list[Any] = []
        for sequence in records:
            hit = self._look_up(kv, sequence, found)
            sequence.kv = PrefixHint(hit)
        if found:
            import numpy as np

            kv.release(np.concatenate(found))
        await out.send(records)

    @staticmethod
    def _look_up(kv: Any, sequence: Sequence, found: list[Any]) -> int:
        match = kv.match(
            sequence.prompt_tokens, namespace_of(sequence), limit=len(sequence.prompt_tokens) - 1, record=False
        )
        if match.tokens:
            found.append(match.blocks)
        return int(match.tokens)
