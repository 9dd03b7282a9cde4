"""kv_commit: makes computed KV reusable."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..config import InferenceMode
from ..runtime.flow.operator import Operator, OperatorConfig, Outlet, Port, RecordKind, operator
from ..runtime.scheduler.lease import Lease, namespace_of

if TYPE_CHECKING:
    from ..kv_runtime.tiers import KVTiers
    from ..records import Sequence

log = logging.getLogger("sageLLM")

_SEQUENCE = frozenset({RecordKind.SEQUENCE})


class KVCommitConfig(OperatorConfig):
    """`outputs`: also commit the KV of the generated tokens, when the sequence ends."""

    outputs: bool = True


@operator("kv_commit")
class KVCommit(Operator[KVCommitConfig]):
    """Enters each prompt's KV into the prefix tree as soon as it is computed, so that requests in flight share it.

    A prompt that a request pins stays there; one that it unpins may be evicted again (where it is not pinned nothing
    happens, told at debug level). The output's KV follows when the
    sequence ends, before its blocks go back to the pool. With engine.inference_mode PREFILL_ONLY and files below the
    pool, a prompt goes on when all of its whole blocks are in files; its record tells of how many tokens they are not.

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
        if engine.config.inference_mode is InferenceMode.PREFILL_ONLY and engine.tiers:
            await self._export(engine.tiers[0], computed)
        engine.pins.pinned(computed)
        for sequence in computed:
            if sequence.request.unpin:
                where = sequence.prompt_tokens, namespace_of(sequence)
                if not sum(kv.unpin(*where) for kv in engine.kv_caches):
                    log.debug("request %s unpins a prompt that is not pinned", sequence.request_id)
        engine.worker.on_leases_returned()
        await out.send(records)

    async def _export(self, tiers: KVTiers, computed: list[Sequence]) -> None:
        engine = self.context.engine
        if not tiers.has_files or not computed:
            return
        import numpy as np

        runs = [(each.prompt_tokens, each.kv.blocks, namespace_of(each)) for each in computed]
        held = np.concatenate([blocks for _, blocks, _ in runs])
        engine.kv.retain(held)  # whatever becomes of the requests meanwhile
        try:
            missing = await engine.run_io(lambda: [tiers.export(*run) for run in runs])
        finally:
            engine.kv.release(held)
        size, fails = engine.config.kv_cache.block_size, engine.config.scheduler.on_transfer_failure == "fail"
        for sequence, count in zip(computed, missing, strict=True):
            sequence.unexported_tokens = count * size
            if count and fails:
                sequence.error = f"{count} KV blocks of the prompt could not be exported to kv_cache.nvme_path"
