"""The planner: which tokens the next step computes. Deterministic, no torch, unit-tested without a model."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from ...errors import KVCacheError
from ...kv_runtime.pool import NO_BLOCKS
from .lease import BlockCopy, namespace_of
from .plan import KVExport, PromptChunk, StepPlan
from .resident import ResidentTable, RowState

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ...kv_runtime.cache import KVCache
    from ...records import Sequence
    from .lease import Claim
    from .slo import ChunkBudget
    from .swap import Swap
    from .time_share import TimeShare


class MustReadFirst(Exception):
    """Blocks ran out while steps are unread: read them, then plan again (a row can be preempted only when known)."""


class Planner:
    """Plans steps. Hybrid ones: every decoding row gets a token, prompt chunks fill the rest of the token budget. With
    `time_share` a step is of one kind. With `chunk_budget` prompts get no more than keeps decoding rows in time; where
    none decode, they get the whole budget.

    `max_prefill_batch` and `max_decode_batch`, in rows, may be set at any time; the next plan heeds them. By `rank` of
    their sequences, then by admission, prompts are computed and preempted rows resumed; the last by it is preempted.
    With a `swap` its KV is kept there, else it is computed again.
    """

    def __init__(
        self,
        table: ResidentTable,
        kv: KVCache,
        max_step_tokens: int,
        max_prefill_batch: int,
        max_decode_batch: int,
        rank: Callable[[Sequence], float],
        on_preempted: Callable[[int], None],
        leases_in_transit: Callable[[], bool],
        time_share: TimeShare | None = None,
        chunk_budget: ChunkBudget | None = None,
    ) -> None:
        self._table = table
        self._kv = kv
        self._max_step_tokens = max_step_tokens
        self.max_prefill_batch = max_prefill_batch
        self.max_decode_batch = max_decode_batch
        self._rank = rank
        self._on_preempted = on_preempted
        self._leases_in_transit = leases_in_transit
        self._time_share = time_share
        self._chunk_budget = chunk_budget
        self._copies: list[BlockCopy] = []
        self._copied: list[int] = []  # sources of the newest plan's copies, retained until it has been launched
        self.preemptions = 0
        self.swap: Swap | None = None

    def add_copy(self, copy: BlockCopy) -> None:
        """Have a block copied at the start of the next step; the source stays retained until then."""
        self._copies.append(copy)

    def plan(self, unread_steps: int, claim: Claim | None = None) -> StepPlan | None:
        """Plan one step, or None when nothing can be computed now.

        For a claim the last rows by rank that come after it are preempted until there is room, and none of them is
        resumed while it stands. One preempted row that comes before it keeps it from having room.

        Raises:
            MustReadFirst: a row must be preempted, but `unread_steps` > 0.
            KVCacheError: one row alone does not fit the pool (admission should have refused it).
        """
        self._release_copied()
        self._resume_preempted(claim)
        if claim is not None:
            self._make_room(claim, unread_steps)
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
        first = turns.prefill_is_next
        for prefill in (first, not first):
            if prefill:
                chunks = self._chunks(self._max_step_tokens, self._decoding(), turns.decode_steps_for_each)
            else:
                decode = self._decode_slots(unread_steps)
            if len(decode) or chunks:
                turns.take(prefill)
                break
        return decode, chunks

    # -- decode ------------------------------------------------------------------------------------------------------

    def _decode_slots(self, unread_steps: int) -> NDArray[np.int64]:
        table = self._table
        limit = min(self.max_decode_batch, self._max_step_tokens)
        while True:
            slots = self._decoding()
            if len(slots) > limit:
                # The rows with the fewest outputs first: nobody falls behind for long.
                slots = slots[np.argsort(table.launched[slots], kind="stable")[:limit]]
                slots.sort()
            short = slots[self._is_short(slots)]
            if not len(short):
                return slots
            fresh = self._kv.allocate(len(short))
            if fresh is not None:
                table.blocks[short, table.num_blocks[short]] = fresh
                table.num_blocks[short] += 1
                return slots
            if unread_steps:
                raise MustReadFirst
            if not self._preempt_last():
                return slots[~np.isin(slots, short)]  # rows between prefill and decode hold the blocks: wait for them

    def _is_short(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Of which the next token needs one more block."""
        table = self._table
        short: NDArray[np.bool_] = table.computed[slots] >= table.num_blocks[slots] * table.block_size
        return short

    def _decoding(self) -> NDArray[np.int64]:
        table = self._table
        return np.flatnonzero(table.is_in(RowState.DECODE) & (table.launched < table.max_outputs))

    def _preempt_last(self) -> bool:
        """Take the blocks of the row whose turn is last, if none are free by now; False if only rows in transit could
        free any."""
        candidates = self._in_turn(RowState.PREFILL, RowState.DECODE)
        candidates = candidates[self._table.num_blocks[candidates] > 0]
        if len(candidates) <= 1:
            if not len(candidates) or self._leases_in_transit():
                return False
            if self._kv.available():
                return True  # given back by another thread meanwhile
            if not self._leases_in_transit():  # nor was anything granted meanwhile
                raise KVCacheError("one sequence alone fills the KV pool: raise kv_cache.max_tokens")
            return False
        self._preempt_or_swap(int(candidates[-1]))
        return True

    def _preempt_or_swap(self, slot: int) -> None:
        if self.swap is not None:
            self._swap_out(self.swap, slot)
        self.preempt(slot)

    def _make_room(self, claim: Claim, unread_steps: int) -> None:
        first = self._in_turn(RowState.PREEMPTED)[:1].tolist()
        if any(self._rank_at(slot) <= claim.rank for slot in first):
            claim.has_room = False
            return
        table = self._table
        while self._kv.available() < claim.blocks + np.count_nonzero(self._is_short(self._decoding())):
            rows = self._in_turn(RowState.PREFILL, RowState.DECODE)
            rows = rows[table.num_blocks[rows] > 0]
            if not len(rows) or self._rank_at(rows[-1]) <= claim.rank:
                break
            if unread_steps:
                raise MustReadFirst
            self._preempt_or_swap(int(rows[-1]))
        claim.has_room = self._kv.available() >= claim.blocks

    def _rank_at(self, slot: int) -> float:
        row = self._table.rows[slot]
        assert row is not None
        return self._rank(row.owner.sequence)

    def _swap_out(self, swap: Swap, slot: int) -> None:
        row = self._table.rows[slot]
        assert row is not None
        computed = self._table.tokens(slot, int(self._table.computed[slot]))
        swap.save(slot, computed, self._table.row_blocks(slot), namespace_of(row.owner.sequence))

    def _in_turn(self, *states: RowState) -> NDArray[np.int64]:
        """Slots in any of the states by rank, of equals the one admitted first."""
        slots = self._table.slots_in(*states)
        if len(slots) <= 1:
            return slots
        ranks = [self._rank(row.owner.sequence) for slot in slots.tolist() if (row := self._table.rows[slot])]
        return slots[np.argsort(ranks, kind="stable")]

    def preempt(self, slot: int) -> None:
        """Take a row's blocks: it is computed again up to its last output read. No step with it may be unread."""
        row = self._table.rows[slot]
        assert row is not None
        if row.owner.lease.handover is not None:
            row.owner.lease.handover.start_again()
        self._forget_kv(slot, RowState.PREEMPTED)

    def _forget_kv(self, slot: int, state: RowState) -> None:
        table = self._table
        row = table.rows[slot]
        assert row is not None
        blocks = table.row_blocks(slot)
        self._drop_copies_into(blocks)
        self._kv.release(blocks)
        self._kv.release(row.owner.lease.fork_blocks)
        row.owner.lease.fork_blocks = NO_BLOCKS
        table.num_blocks[slot] = 0
        table.computed[slot] = 0
        table.launched[slot] = table.outputs_read[slot]
        table.target[slot] = table.prompt_len[slot] + table.outputs_read[slot]
        table.state[slot] = state
        self.preemptions += 1
        self._on_preempted(slot)

    def lose_kv(self) -> None:
        """The KV of every row is gone, and with it the steps that are unread: compute all of it again.

        Rows keep the outputs that were read. Those on their way to decode stay held, without blocks, until they come.
        """
        table = self._table
        for slot in table.slots_in(RowState.PREFILL, RowState.HELD, RowState.DECODE).tolist():
            row, held = table.rows[slot], table.state[slot] == int(RowState.HELD)
            assert row is not None
            if held and row.owner.posted:
                self._forget_kv(slot, RowState.HELD)
            elif held and row.choice.index:
                self._forget_kv(slot, RowState.FORKING)
            else:
                self.preempt(slot)

    def _release_copied(self) -> None:
        """The newest plan has been launched: whoever writes to the sources from now on comes after the copies."""
        if self._copied:
            self._kv.release(np.array(self._copied, np.int32))
            self._copied = []

    def _drop_copies_into(self, blocks: NDArray[np.int32]) -> None:
        owned = set(blocks.tolist())
        kept = []
        for copy in self._copies:
            if copy.target in owned:
                self._kv.release(np.array([copy.source], np.int32))
            else:
                kept.append(copy)
        self._copies = kept

    def forget(self, slots: list[int]) -> None:
        """Rows end: their copies that were not launched are dropped and their blocks released."""
        self._release_copied()
        blocks = self._table.all_blocks(slots)
        if self._copies:
            self._drop_copies_into(blocks)
        self._kv.release(blocks)
        self._table.num_blocks[slots] = 0
        if self.swap is not None:
            for slot in slots:
                self.swap.forget(slot)

    def _resume_preempted(self, claim: Claim | None) -> None:
        """In turn, give preempted rows blocks for all their tokens and one more; stop at the first that waits.

        Those that come after a claim wait for it.
        """
        table = self._table
        if not table.has(RowState.PREEMPTED):
            return
        for slot in self._in_turn(RowState.PREEMPTED).tolist():
            row = table.rows[slot]
            assert row is not None
            if claim is not None and self._rank_at(slot) > claim.rank:
                return
            target = int(table.target[slot])
            tokens = table.tokens(slot, target)
            sequence = row.owner.sequence
            # With prompt logprobs every prompt position must be computed again while they are still incomplete.
            reuse = sequence.sampling.prompt_logprobs is None or table.outputs_read[slot] > 0
            limit, namespace = target - 1 if reuse else 0, namespace_of(sequence)
            forks = len(row.owner.slots) - 1 if not row.owner.decoding and target % table.block_size else 0
            needed = -(-(target + 1) // table.block_size) + forks
            if self.swap is not None:
                has_room = needed <= self._kv.available()
                if self.swap.is_coming(slot, tokens, namespace, limit, has_room=has_room):
                    return
            match = self._kv.match(tokens, namespace, limit, record=False)
            fresh = self._kv.allocate(needed - match.tokens // table.block_size)
            if fresh is None and match.tokens % table.block_size:
                # A partly covered block takes two while it is copied: a row that fills the pool goes without.
                whole = match.whole_blocks(table.block_size)
                self._kv.release(match.blocks[len(whole.blocks) :])
                match = whole
                fresh = self._kv.allocate(needed - len(match.blocks))
            if fresh is None:
                self._kv.release(match.blocks)
                return
            full, own = match.tokens // table.block_size, len(fresh) - forks
            row.owner.lease.fork_blocks = fresh[own:]
            fresh = fresh[:own]
            if match.tokens % table.block_size:
                self._copies.append(BlockCopy(int(match.blocks[full]), int(fresh[0])))
            table.set_blocks(slot, np.concatenate([match.blocks[:full], fresh]))
            table.computed[slot] = match.tokens
            table.state[slot] = RowState.PREFILL
            if self.swap is not None:
                self.swap.forget(slot)

    @property
    def has_preempted(self) -> bool:
        return self._table.has(RowState.PREEMPTED)

    # -- prefill -----------------------------------------------------------------------------------------------------

    def _chunks(self, budget: int, decode: NDArray[np.int64], decode_steps: float | None = None) -> list[PromptChunk]:
        """Chunks of at most `budget` tokens. The rows `decode` get theirs in the same step, or in `decode_steps` of
        their own for each such step."""
        table = self._table
        chunks: list[PromptChunk] = []
        if budget <= 0 or not table.has(RowState.PREFILL):
            return chunks
        slots = self._in_turn(RowState.PREFILL)[: self.max_prefill_batch]
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
            self._ask_prompt_logprobs(chunk, tokens)
            chunks.append(chunk)
            budget -= end - start
            if budget <= 0:
                break
        return chunks

    def _ask_prompt_logprobs(self, chunk: PromptChunk, tokens: NDArray[np.int32]) -> None:
        row = self._table.rows[chunk.slot]
        assert row is not None
        wanted = row.owner.sequence.sampling.prompt_logprobs
        if wanted is None or self._table.outputs_read[chunk.slot] > 0:
            return
        chunk.next_tokens = tokens[chunk.start + 1 : chunk.start + len(chunk.tokens) + 1]
        chunk.top_logprobs = wanted

    # -- building ----------------------------------------------------------------------------------------------------

    def _sampling_slots(self, chunk: PromptChunk) -> list[int]:
        """The slots that get their next token from a chunk: all choices when the prompt ends, else none."""
        if not chunk.is_last:
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
        copies, self._copies = self._copies, []
        self._copied = [copy.source for copy in copies]
        return StepPlan(
            decode_slots=decode,
            decode_positions=table.computed[decode],
            chunks=chunks,
            block_tables=table.blocks[slots, :width],
            copies=[(copy.source, copy.target) for copy in copies],
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
        return handover.export(chunk.slot, chunk.epoch, self._kv, self._table.row_blocks(chunk.slot), end)

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
                (resumed if row.owner.decoding else held).extend(slots)
                if len(slots) > 1:
                    self.fork(chunk.slot, slots[1:])
        table.state[held] = RowState.HELD
        table.state[resumed] = RowState.DECODE

    def fork(self, first: int, others: list[int]) -> None:
        """Give the further choices the prompt's blocks; one that is partly filled is copied for each."""
        table = self._table
        row = table.rows[first]
        assert row is not None
        blocks = table.row_blocks(first)
        full = int(table.prompt_len[first]) // table.block_size
        for other, own in zip(others, self._fork_targets(row.owner.lease.fork_blocks, len(others)), strict=True):
            self._kv.retain(blocks[:full])
            table.set_blocks(other, np.concatenate([blocks[:full], own]))
            table.computed[other] = table.computed[first]
            if len(own):
                source = blocks[full : full + 1]
                self._kv.retain(source)
                self._copies.append(BlockCopy(int(source[0]), int(own[0])))
        row.owner.lease.fork_blocks = NO_BLOCKS

    @staticmethod
    def _fork_targets(fork_blocks: NDArray[np.int32], count: int) -> list[NDArray[np.int32]]:
        if len(fork_blocks):
            return [fork_blocks[i : i + 1] for i in range(count)]
        return [NO_BLOCKS] * count
