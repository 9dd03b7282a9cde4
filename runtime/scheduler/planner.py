"""The planner: which tokens the next step computes. Deterministic, no torch, unit-tested without a model."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from .plan import KVExport, PromptChunk, StepPlan
from .resident import ResidentTable, RowState

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .lease import Claim
    from .prompt_turns import DecodeTurns, PromptTurns
    from .row_blocks import RowBlocks
    from .slo import ChunkBudget
    from .time_share import StepShares, TimeShare


class Planner:
    """Plans steps. Hybrid ones: every decoding row gets a token, prompt chunks fill the rest of the token budget. With
    `time_share` a step is of one kind; with `step_shares`, too, a turn of decoding rows that has begun ends as soon as
    these owe a prompt a step. With `chunk_budget` prompts get no more than keeps decoding rows in time; where none
    decode, they get the whole budget.

    `max_prefill_batch` and `max_decode_batch`, in rows, may be set at any time; the next plan heeds them. Prompts are
    computed in the order of `blocks.in_turn`, with `prompt_turns` in that one for each tenant.
    Where more rows decode than a step has room for, `decode_turns` says whose are next.
    """

    def __init__(
        self,
        table: ResidentTable,
        blocks: RowBlocks,
        max_step_tokens: int,
        max_prefill_batch: int,
        max_decode_batch: int,
        time_share: TimeShare | None = None,
        chunk_budget: ChunkBudget | None = None,
        prompt_turns: PromptTurns | None = None,
        step_shares: StepShares | None = None,
        decode_turns: DecodeTurns | None = None,
    ) -> None:
        self._table = table
        self._blocks = blocks
        self._max_step_tokens = max_step_tokens
        self.max_prefill_batch = max_prefill_batch
        self.max_decode_batch = max_decode_batch
        self._time_share = time_share
        self._chunk_budget = chunk_budget
        self._prompt_turns = prompt_turns
        self._step_shares = step_shares
        self._decode_turns = decode_turns

    def plan(self, unread_steps: int, claim: Claim | None = None) -> StepPlan | None:
        """Plan one step, or None when nothing can be computed now.

        A claim is made room for first; rows that come after it give way (`RowBlocks.make_room`).

        Raises:
            MustReadFirst: a row must be preempted, but `unread_steps` > 0.
            KVCacheError: one row alone does not fit the pool (admission should have refused it).
        """
        self._blocks.copies.release_taken()
        self._blocks.resume(claim)
        if claim is not None:
            self._blocks.make_room(claim, unread_steps)
        if self._time_share is None:
            decode = self._decode_slots(unread_steps)
            chunks = self._chunks(self._max_step_tokens - len(decode), decode)
        else:
            decode, chunks = self._take_turn(self._time_share, unread_steps)
        if not len(decode) and not chunks:
            return None
        sampled = [self._sampling_slots(chunk) for chunk in chunks]
        plan = self._build(decode, chunks, sampled)
        self._advance(decode, chunks, sampled)
        return plan

    def _take_turn(self, turns: TimeShare, unread_steps: int) -> tuple[NDArray[np.int64], list[PromptChunk]]:
        decode, chunks = np.empty(0, np.int64), list[PromptChunk]()
        first = turns.prefill_is_next or (turns.is_decoding and self._owes_prompt())
        for prefill in (first, not first):
            if prefill:
                chunks = self._chunks(self._max_step_tokens, self._table.decoding(), turns.decode_steps_for_each)
            else:
                decode = self._decode_slots(unread_steps)
            if len(decode) or chunks:
                turns.take(prefill)
                break
        if self._step_shares is not None and len(decode) and self._table.has(RowState.PREFILL):
            for tenant, rows in self._count_rows(decode).items():
                self._step_shares.take(tenant, rows / len(decode))
        return decode, chunks

    def _owes_prompt(self) -> bool:
        table = self._table
        if self._step_shares is None or not table.has(RowState.PREFILL):
            return False
        prompts = self._prompts(table.slots_in(RowState.PREFILL))
        return self._step_shares.is_owed(*prompts, self._count_rows(table.decoding()))

    def advance(self, steps: int) -> None:
        """So many steps that only decode were planned elsewhere, and the table says so."""
        if self._time_share is not None:
            self._time_share.take(prefill=False, steps=steps)

    # -- decode ------------------------------------------------------------------------------------------------------

    def _decode_slots(self, unread_steps: int) -> NDArray[np.int64]:
        table = self._table
        limit = min(self.max_decode_batch, self._max_step_tokens)
        while True:
            decoding = table.decoding()
            slots = decoding if len(decoding) <= limit else self._next_to_decode(decoding, limit)
            extended = self._blocks.extend(slots, unread_steps)
            if extended is not None:
                break
        if self._decode_turns is not None and len(decoding) > limit:
            left_out = np.setdiff1d(decoding, slots, assume_unique=True)
            self._decode_turns.serve(self._count_rows(extended), self._count_rows(left_out))
        return extended

    def _next_to_decode(self, slots: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
        """The rows with the fewest outputs first, with `decode_turns` among those of each tenant: nobody falls behind
        for long."""
        slots = slots[np.argsort(self._table.launched[slots], kind="stable")]
        if self._decode_turns is not None:
            tenants = self._tenants(slots)
            slots = slots[self._decode_turns.order(tenants, [1.0] * len(tenants), limit)]
        return np.sort(slots[:limit])

    # -- prefill -----------------------------------------------------------------------------------------------------

    def _chunks(self, budget: int, decode: NDArray[np.int64], decode_steps: float | None = None) -> list[PromptChunk]:
        """Chunks of at most `budget` tokens. The rows `decode` get theirs in the same step, or in `decode_steps` of
        their own for each such step."""
        table = self._table
        chunks: list[PromptChunk] = []
        if budget <= 0 or not table.has(RowState.PREFILL):
            return chunks
        slots = self._prompts_in_turn()
        if self._chunk_budget is not None and len(decode):
            starts = table.computed[slots]
            work = (table.computed[decode] + 1, starts, table.target[slots] - starts, budget)
            if decode_steps is None:
                budget = self._chunk_budget.mixed(*work)
            else:
                budget = self._chunk_budget.alternating(*work, decode_steps)
            if not budget:
                return chunks
        columns = (slots, table.epoch[slots], table.computed[slots], table.target[slots])
        for slot, epoch, start, target in zip(*(column.tolist() for column in columns), strict=True):
            end = min(target, start + budget)
            tokens = table.tokens(slot, target)
            chunk = PromptChunk(slot, epoch, start, tokens[start:end], end == target)
            self._ask_beside_tokens(chunk, tokens)
            chunks.append(chunk)
            budget -= end - start
            if budget <= 0:
                break
        if self._prompt_turns is not None:
            self._charge(self._prompt_turns, chunks, lacks_tokens=budget <= 0)
        return chunks

    def _prompts_in_turn(self) -> NDArray[np.int64]:
        """Slots of the prompts that a step may compute, the first one first."""
        limit = self.max_prefill_batch
        slots = self._blocks.in_turn(RowState.PREFILL)
        if self._prompt_turns is None:
            return slots[:limit]
        return slots[self._prompt_turns.order(*self._prompts(slots), limit)]

    def _prompts(self, slots: NDArray[np.int64]) -> tuple[list[str], list[float]]:
        """Tenants of prompts, and which share of a step each takes."""
        left = (self._table.target[slots] - self._table.computed[slots]).tolist()
        shares = [min(max(tokens / self._max_step_tokens, 1 / self.max_prefill_batch), 1.0) for tokens in left]
        return self._tenants(slots), shares

    def _charge(self, turns: PromptTurns, chunks: list[PromptChunk], lacks_tokens: bool) -> None:
        """Note who had which share of a step: of its tokens, or of its rows where there were tokens left."""
        tokens = sum(len(chunk.tokens) for chunk in chunks)
        for chunk in chunks:
            share = len(chunk.tokens) / tokens if lacks_tokens else 1 / len(chunks)
            turns.take(self._table.tenants[chunk.slot], share)
            if self._step_shares is not None:
                self._step_shares.take(self._table.tenants[chunk.slot], share)

    def _count_rows(self, slots: NDArray[np.int64]) -> Counter[str]:
        return Counter(self._tenants(slots))

    def _tenants(self, slots: NDArray[np.int64]) -> list[str]:
        return [*map(self._table.tenants.__getitem__, slots.tolist())]

    def _ask_beside_tokens(self, chunk: PromptChunk, tokens: NDArray[np.int32]) -> None:
        row = self._table.rows[chunk.slot]
        assert row is not None
        sequence = row.owner.sequence
        chunk.pooling = sequence.request.pooling
        wanted = sequence.sampling.prompt_logprobs
        if wanted is None or self._table.outputs_read[chunk.slot] > 0:
            return
        chunk.next_tokens = tokens[chunk.start + 1 : chunk.start + len(chunk.tokens) + 1]
        chunk.top_logprobs = wanted

    # -- building ----------------------------------------------------------------------------------------------------

    def _sampling_slots(self, chunk: PromptChunk) -> list[int]:
        """The slots that get their next token from a chunk: all choices when the prompt ends, else none, and none where
        it is only pooled."""
        if not chunk.is_last or chunk.pooling is not None:
            return []
        row = self._table.rows[chunk.slot]
        assert row is not None
        if row.owner.decoding:
            return [chunk.slot]
        return row.owner.slots

    def _build(self, decode: NDArray[np.int64], chunks: list[PromptChunk], sampled: list[list[int]]) -> StepPlan:
        table = self._table
        slots = decode
        sample_slots, sample_rows = decode, np.arange(len(decode))
        if chunks:
            slots = np.concatenate([decode, np.array([chunk.slot for chunk in chunks], np.int64)])
            ends = len(decode) + np.cumsum([len(chunk.tokens) for chunk in chunks])
            extra_rows = np.repeat(ends - 1, [len(sampling) for sampling in sampled])
            sample_slots = np.concatenate([decode, np.array([*chain.from_iterable(sampled)], np.int64)])
            sample_rows = np.concatenate([sample_rows, extra_rows])
        width = int(table.num_blocks[slots].max())
        return StepPlan(
            decode_slots=decode,
            decode_positions=table.computed[decode],
            chunks=chunks,
            block_tables=table.blocks[slots, :width],
            copies=self._blocks.copies.take(),
            sample_slots=sample_slots,
            sample_rows=sample_rows,
            sample_steps=table.launched[sample_slots],
            sample_epochs=table.epoch[sample_slots],
            exports=[*filter(None, map(self._export, chunks))],
        )

    def _export(self, chunk: PromptChunk) -> KVExport | None:
        """What is to be handed over once a chunk is computed."""
        row = self._table.rows[chunk.slot]
        assert row is not None
        handover, end = row.owner.lease.handover, chunk.start + len(chunk.tokens)
        if handover is None or handover.error is not None or end <= handover.sent:
            return None
        return handover.export(chunk.slot, chunk.epoch, self._blocks.kv, self._table.row_blocks(chunk.slot), end)

    def _advance(self, decode: NDArray[np.int64], chunks: list[PromptChunk], sampled: list[list[int]]) -> None:
        table = self._table
        table.computed[decode] += 1
        table.launched[decode] += 1
        if not chunks:
            return
        table.computed[[chunk.slot for chunk in chunks]] += [len(chunk.tokens) for chunk in chunks]
        table.launched[[*chain.from_iterable(sampled)]] += 1
        held: list[int] = []
        resumed: list[int] = []
        for chunk, slots in zip(chunks, sampled, strict=True):
            if chunk.is_last:
                row = table.rows[chunk.slot]
                assert row is not None
                (resumed if row.owner.decoding else held).extend(slots or [chunk.slot])
                if len(slots) > 1:
                    self._blocks.fork(chunk.slot, slots[1:])
        table.state[held] = RowState.HELD
        table.state[resumed] = RowState.DECODE
