"""kv_commit: makes computed KV reusable."""

from __future__ import annotations

from typing import Any

from ..runtime.flow.operator import Operator, OperatorConfig, Outlet, Port, RecordKind, operator
from ..runtime.scheduler.lease import Lease, namespace_of

_SEQUENCE = frozenset({RecordKind.SEQUENCE})


class KVCommitConfig(OperatorConfig):
    """`outputs`: also commit the KV of the generated tokens, when the sequence ends."""

    outputs: bool = True


@operator("kv_commit")
class KVCommit(Operator[KVCommitConfig]):
    """Enters each prompt's KV into the prefix tree as soon as it is computed, so that requests in flight share it.

    A prompt that a request pins stays there; one that it unpins may be evicted again. The output's KV follows when the
    sequence ends, before its blocks go back to the pool.

    Guarantee: one record out for each record in, in order.
    """

    config_model = KVCommitConfig
    inputs = (Port("in", _SEQUENCE),)
    outputs = (Port("out", _SEQUENCE),)
    requires = frozenset({"prefilled"})
    provides = frozenset({"committed"})
    precedes = frozenset({"decoded"})
    guarantee = "one record out for each record in, in order"
    example = "kv_commit: {outputs: true}"

    async def open(self) -> None:
        self.context.engine.pins.served = True

    async def process(self, records: list[Any], out: Outlet) -> None:
        engine = self.context.engine
        computed = [sequence for sequence in records if isinstance(sequence.kv, Lease)]  # the others have ended
        for sequence in computed:
            sequence.kv.commit_outputs = self.config.outputs
        engine.leases.commit(computed)
        engine.pins.pinned(computed)
        for sequence in computed:
            if sequence.request.unpin:
                for kv in engine.kv_caches:
                    kv.unpin(sequence.prompt_tokens, namespace_of(sequence))
        engine.worker.on_leases_returned()
        await out.send(records)
