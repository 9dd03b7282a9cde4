"""kv_lookup: how much of a prompt's KV is cached already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..runtime.flow.operator import Operator, OperatorConfig, Outlet, Port, RecordKind, operator
from ..runtime.scheduler.lease import PrefixHint, may_reuse, namespace_of

if TYPE_CHECKING:
    from ..kv_runtime.tiers import KVTiers
    from ..records import Sequence

_SEQUENCE = frozenset({RecordKind.SEQUENCE})


@operator("kv_lookup")
class KVLookup(Operator[OperatorConfig]):
    """Looks each prompt up in the prefix tree, keeps what it hits warm, and lets `schedule` reuse it.

    Without this stage no cached prefix is reused. The hit counts when the lease is granted: until then more of the
    prefix may have been computed, or have been evicted. What lower tiers hold of a prompt starts on its way up here.

    Guarantee: one record out for each record in, in order.
    """

    inputs = (Port("in", _SEQUENCE),)
    outputs = (Port("out", _SEQUENCE),)
    requires = frozenset({"tokenized"})
    provides = frozenset({"looked_up"})
    precedes = frozenset({"leased"})
    guarantee = "one record out for each record in, in order"
    example = "kv_lookup: {}"

    @staticmethod
    def _start_fetch(tiers: KVTiers, sequence: Sequence) -> None:
        if may_reuse(sequence):
            prompt = sequence.prompt_tokens
            sequence.kv.fetch = tiers.wish(prompt, namespace_of(sequence), len(prompt) - 1)
            tiers.fetcher.is_coming(sequence.kv.fetch)

    async def process(self, records: list[Any], out: Outlet) -> None:
        prompts = [(sequence.prompt_tokens, namespace_of(sequence)) for sequence in records]
        for sequence, cached in zip(records, self.context.engine.leases.count_cached(prompts), strict=True):
            sequence.kv = PrefixHint(cached)
        if self.context.engine.tiers is not None:
            for sequence in records:
                self._start_fetch(self.context.engine.tiers, sequence)
        await out.send(records)
