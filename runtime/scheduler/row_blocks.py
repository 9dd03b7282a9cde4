"""The KV blocks of resident rows: how they get them, lose them to others (preemption) and get them back. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...errors import KVCacheError
from ...kv_runtime.pool import NO_BLOCKS
from .block_copies import BlockCopies
from .lease import BlockCopy, namespace_of, needs_every_position
from .resident import RowState

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ...kv_runtime.cache import KVCache
    from ...records import Sequence
    from .lease import Claim, Rank
    from .resident import ResidentTable
    from .swap import Swap


class MustReadFirst(Exception):
    """Blocks ran out while steps are unread: read them, then plan again (a row can be preempted only when known)."""


class RowBlocks:
    """Gives blocks to rows and takes them back.

    When they run out the last row by `rank` of the sequences, of equals the one admitted last, is preempted; the first
    is resumed first. With a `swap` its KV is kept there, else it is computed again.
    """

    def __init__(
        self,
        table: ResidentTable,
        kv: KVCache,
        rank: Callable[[Sequence], Rank],
        on_preempted: Callable[[int], None],
        leases_in_transit: Callable[[], bool],
    ) -> None:
        self._table = table
        self.kv = kv
        self._rank = rank
        self._on_preempted = on_preempted
        self._leases_in_transit = leases_in_transit
        self.copies = BlockCopies(kv)
        self.preemptions = 0
        self.swap: Swap | None = None

    def in_turn(self, *states: RowState) -> NDArray[np.int64]:
        """Slots in any of the states by rank, of equals the one admitted first."""
        slots = self._table.slots_in(*states)
        if len(slots) <= 1:
            return slots
        return np.array(sorted(slots.tolist(), key=self._rank_at), np.int64)

    def _rank_at(self, slot: int) -> Rank:
        row = self._table.rows[slot]
        assert row is not None
        return self._rank(row.owner.sequence)

    def _is_short(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Of which the next token needs one more block."""
        table = self._table
        short: NDArray[np.bool_] = table.computed[slots] >= table.num_blocks[slots] * table.block_size
        return short

    def extend(self, slots: NDArray[np.int64], unread_steps: int) -> NDArray[np.int64] | None:
        """Give each of the rows a block if its next token needs one; the rows that have room for it.

        None if another row was preempted for it: some of these may have gone.

        Raises:
            MustReadFirst: a row must be preempted, but `unread_steps` > 0.
            KVCacheError: one row alone does not fit the pool (admission should have refused it).
        """
        table = self._table
        short = slots[self._is_short(slots)]
        if not len(short):
            return slots
        fresh = self.kv.allocate(len(short))
        if fresh is not None:
            table.blocks[short, table.num_blocks[short]] = fresh
            table.num_blocks[short] += 1
            return slots
        if unread_steps:
            raise MustReadFirst
        if self._preempt_last():
            return None
        return slots[~np.isin(slots, short)]  # rows between prefill and decode hold the blocks: wait for them

    def forget(self, slots: list[int]) -> None:
        """Rows end: their copies that were not launched are dropped and their blocks released."""
        self.copies.release_taken()
        blocks = self._table.all_blocks(slots)
        self.copies.drop_into(blocks)
        self.kv.release(blocks)
        self._table.num_blocks[slots] = 0
        if self.swap is not None:
            for slot in slots:
                self.swap.forget(slot)

    def fork(self, first: int, others: list[int]) -> None:
        """Give the further choices the prompt's blocks; one that is partly filled is copied for each."""
        table = self._table
        row = table.rows[first]
        assert row is not None
        blocks = table.row_blocks(first)
        full = int(table.prompt_len[first]) // table.block_size
        for other, own in zip(others, self._fork_targets(row.owner.lease.fork_blocks, len(others)), strict=True):
            self.kv.retain(blocks[:full])
            table.set_blocks(other, np.concatenate([blocks[:full], own]))
            table.computed[other] = table.computed[first]
            if len(own):
                source = blocks[full : full + 1]
                self.kv.retain(source)
                self.copies.add(BlockCopy(int(source[0]), int(own[0])))
        row.owner.lease.fork_blocks = NO_BLOCKS

    @staticmethod
    def _fork_targets(fork_blocks: NDArray[np.int32], count: int) -> list[NDArray[np.int32]]:
        if len(fork_blocks):
            return [fork_blocks[i : i + 1] for i in range(count)]
        return [NO_BLOCKS] * count

    # -- preemption --------------------------------------------------------------------------------------------------

    @property
    def has_preempted(self) -> bool:
        return self._table.has(RowState.PREEMPTED)

    def _preempt_last(self) -> bool:
        """Take the blocks of the row whose turn is last, if none are free by now; False if only rows in transit could
        free any."""
        candidates = self.in_turn(RowState.PREFILL, RowState.DECODE)
        candidates = candidates[self._table.num_blocks[candidates] > 0]
        if len(candidates) <= 1:
            if not len(candidates) or self._leases_in_transit():
                return False
            if self.kv.available():
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

    def _swap_out(self, swap: Swap, slot: int) -> None:
        row = self._table.rows[slot]
        assert row is not None
        computed = self._table.tokens(slot, int(self._table.computed[slot]))
        swap.save(slot, computed, self._table.row_blocks(slot), namespace_of(row.owner.sequence))

    def preempt(self, slot: int) -> None:
        """Take a row's blocks: it is computed again up to its last output read. No step with it may be unread."""
        row = self._table.rows[slot]
        assert row is not None
        if row.owner.lease.handover is not None:
            row.owner.lease.handover.give_way()
        self._forget_kv(slot, RowState.PREEMPTED)

    def _forget_kv(self, slot: int, state: RowState) -> None:
        table = self._table
        row = table.rows[slot]
        assert row is not None
        blocks = table.row_blocks(slot)
        self.copies.drop_into(blocks)
        self.kv.release(blocks)
        self.kv.release(row.owner.lease.fork_blocks)
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

    def make_room(self, claim: Claim, unread_steps: int) -> None:
        """Preempt the last rows that come after a claim until there is room for it and for the next tokens of the rest.

        One preempted row that comes before it keeps it from having room.

        Raises:
            MustReadFirst: a row must be preempted, but `unread_steps` > 0.
        """
        first = self.in_turn(RowState.PREEMPTED)[:1].tolist()
        if any(self._rank_at(slot) < claim.rank for slot in first):
            claim.has_room = False
            return
        while self._is_short_of(claim) or (claim.beyond is not None and claim.beyond.lacks_rows):
            last = self._last_behind(claim)
            claim.has_none_behind = last is None
            if last is None:
                break
            if unread_steps:
                raise MustReadFirst
            self._preempt_or_swap(last)
        claim.has_room = not self._is_short_of(claim)  # else a row preempted for its next token would be overtaken

    def _is_short_of(self, claim: Claim) -> bool:
        return self.kv.available() < claim.blocks + int(np.count_nonzero(self._is_short(self._table.decoding())))

    def _last_behind(self, claim: Claim) -> int | None:
        """The row that gives way to a claim next, None if there is none."""
        behind = [
            slot
            for slot in self.in_turn(RowState.PREFILL, RowState.DECODE).tolist()
            if self._table.num_blocks[slot] and self._rank_at(slot)[0] > claim.rank[0]
        ]
        if claim.beyond is not None and not self._is_short_of(
            claim
        ):  # only what a row has on the other side is lacking
            behind = [slot for slot in behind if self._hands_over_to(claim.beyond.kv, slot)]
        return behind[-1] if behind else None

    def _hands_over_to(self, kv: KVCache, slot: int) -> bool:
        row = self._table.rows[slot]
        return row is not None and row.owner.lease.handover is not None and row.owner.lease.handover.book.kv is kv

    def resume(self, claim: Claim | None) -> None:
        """In turn, give preempted rows blocks for all their tokens and the next; stop at the first that waits.

        Those that come after a claim wait for it.
        """
        if not self.has_preempted:
            return
        for slot in self.in_turn(RowState.PREEMPTED).tolist():
            waits = claim is not None and self._rank_at(slot) >= claim.rank
            if waits or not self._resume(slot):
                return

    def _resume(self, slot: int) -> bool:
        table = self._table
        row = table.rows[slot]
        assert row is not None
        target = int(table.target[slot])
        tokens = table.tokens(slot, target)
        sequence = row.owner.sequence
        # What is asked for of every prompt position is incomplete until the first output.
        reuse = not needs_every_position(sequence) or table.outputs_read[slot] > 0
        limit, namespace = target - 1 if reuse else 0, namespace_of(sequence)
        forks = len(row.owner.slots) - 1 if not row.owner.decoding and target % table.block_size else 0
        end = min(target + 1, int(table.prompt_len[slot] + table.max_outputs[slot]))
        needed = -(-end // table.block_size) + forks
        if self.swap is not None:
            has_room = needed <= self.kv.available()
            if self.swap.is_coming(slot, tokens, namespace, limit, has_room=has_room):
                return False
        match = self.kv.match(tokens, namespace, limit, record=False)
        fresh = self.kv.allocate(needed - match.tokens // table.block_size)
        if fresh is None and match.tokens % table.block_size:
            # A partly covered block takes two while it is copied: a row that fills the pool goes without.
            whole = match.whole_blocks(table.block_size)
            self.kv.release(match.blocks[len(whole.blocks) :])
            match = whole
            fresh = self.kv.allocate(needed - len(match.blocks))
        handover = row.owner.lease.handover
        if fresh is None or (handover is not None and not handover.come_back(sequence)):
            self.kv.release(match.blocks if fresh is None else np.concatenate([match.blocks, fresh]))
            return False
        full, own = match.tokens // table.block_size, len(fresh) - forks
        row.owner.lease.fork_blocks = fresh[own:]
        fresh = fresh[:own]
        if match.tokens % table.block_size:
            self.copies.add(BlockCopy(int(match.blocks[full]), int(fresh[0])))
        table.set_blocks(slot, np.concatenate([match.blocks[:full], fresh]))
        table.computed[slot] = match.tokens
        table.state[slot] = RowState.PREFILL
        if self.swap is not None:
            self.swap.forget(slot)
        return True
