"""kv_lookup: how much of a prompt's KV is cached already."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..config import InferenceMode
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

    async def process(self, records: list[Any], out: Outlet) -> None:
        prompts = [(sequence.prompt_tokens, namespace_of(sequence)) for sequence in records]
        for sequence, cached in zip(records, self.context.engine.leases.count_cached(prompts), strict=True):
            sequence.kv = PrefixHint(cached)
        engine = self.context.engine
        if engine.tiers:
            await self._start_fetches(engine.tiers[0], [sequence for sequence in records if may_reuse(sequence)])
        await out.send(records)

    async def _start_fetches(self, tiers: KVTiers, sequences: list[Sequence]) -> None:
        engine = self.context.engine
        for sequence in sequences:
            engine.leases.look_below(sequence)
        if engine.config.inference_mode is InferenceMode.DECODE_ONLY:
            await engine.run_io(partial(tiers.discover, [sequence.kv.fetch for sequence in sequences]))
        for sequence in sequences:
            sequence.kv.fetcher.is_coming(sequence.kv.fetch)
