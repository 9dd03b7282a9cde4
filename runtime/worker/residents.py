"""The sequences on a worker: they come in by its doors, go back, and leave what they held to others."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...kv_runtime.cache import Commit
from ...records import Choice, FinishReason, Sequence, TokenDelta
from ..scheduler.lease import Lease, namespace_of
from ..scheduler.resident import ResidentSequence, Row, RowState
from ..scheduler.waiting import end_unstarted
from .collector import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...kv_runtime.cache import KVCache
    from ...records import Request
    from ..scheduler.lease import LeaseBook
    from ..scheduler.plan import StepPlan
    from ..scheduler.resident import ResidentTable
    from ..scheduler.row_blocks import RowBlocks
    from ..scheduler.timeouts import Timeouts
    from .collector import Ending, MakeStopMatcher
    from .executor import Executor

log = logging.getLogger("sageLLM")


class Residents:
    """Fills the resident table and empties it. What is to go back to the doors waits in `prefilled` and `decoded`.

    Only the worker's thread calls it, but for `find`. `before_end` gets the rows that end, before they lose their
    blocks.
    """

    def __init__(
        self,
        table: ResidentTable,
        blocks: RowBlocks,
        executor: Executor,
        kv: KVCache,
        leases: LeaseBook,
        timeouts: Timeouts,
        make_stop_matcher: MakeStopMatcher,
        clock: Callable[[], float],
    ) -> None:
        self.prefilled: list[Sequence] = []
        self.decoded: list[Sequence | TokenDelta] = []
        self.leases_returned = False  # or may be granted again: who waits for one is to hear of it
        self.failure: BaseException | None = None  # of the worker: whoever still comes in is sent back
        self.before_end: Callable[[list[Ending]], None] = lambda endings: None
        self.collector = Collector(table, make_stop_matcher, self.end_rows, clock)
        self.timeouts = timeouts
        self._table = table
        self._blocks = blocks
        self._executor = executor
        self._kv = kv
        self._leases = leases
        self._clock = clock
        self._owners: dict[int, ResidentSequence] = {}  # by id of the request

    def __len__(self) -> int:
        return len(self._owners)

    def __iter__(self) -> Iterator[ResidentSequence]:
        return iter([*self._owners.values()])

    def find(self, request: Request) -> ResidentSequence | None:
        """The sequence of a request, if it is here."""
        return self._owners.get(id(request))

    # -- in ----------------------------------------------------------------------------------------------------------

    def enter(self, owner: ResidentSequence) -> bool:
        """Take a sequence with its lease; False if that was reclaimed on the way."""
        # Known here before it arrives: at every moment `LeaseBook.reclaim` or `reclaim` finds the lease.
        request = owner.sequence.request
        self._owners[id(request)] = owner
        arrived = self._leases.arrive(owner.sequence)
        if not arrived:
            del self._owners[id(request)]
        return arrived

    def admit(self, sequences: list[Sequence]) -> None:
        """Take sequences whose prompt is to be computed."""
        for sequence in sequences:
            lease = sequence.kv
            assert isinstance(lease, Lease)
            owner = ResidentSequence(sequence, lease, lease.slots)
            arrived = self.enter(owner)
            if not arrived or sequence.request.cancelled or self.failure is not None:
                self._owners.pop(id(sequence.request), None)
                self._refuse(sequence, lease if arrived else None)
                continue
            timeout = self.timeouts.end_of_running(sequence).at
            sequence.choices = [Choice(index) for index in range(len(lease.slots))]
            for slot, choice in zip(lease.slots, sequence.choices, strict=True):
                state = RowState.FORKING if choice.index else RowState.PREFILL
                self._table.occupy(slot, Row(owner, choice), state, timeout)
                self.collector.watch(slot, sequence)
                self._executor.admit(slot, sequence, choice.index)
            first = lease.slots[0]
            self._table.set_blocks(first, lease.blocks)
            self._table.computed[first] = lease.hit_tokens
            if lease.copy is not None:
                self._blocks.copies.add(lease.copy)
                lease.copy = None
            if lease.generation != self._kv.generation:  # what it was to reuse has been lost meanwhile
                lease.generation = self._kv.generation
                self._blocks.preempt(first)

    def _refuse(self, sequence: Sequence, lease: Lease | None) -> None:
        """Give a sequence back as it came; its lease, unless that was reclaimed, is free again."""
        if lease is not None:
            self._leases.give_back_unused(sequence, lease)
            self.leases_returned = True
        reason = FinishReason.CANCELLED if self.failure is None else FinishReason.ERROR
        end_unstarted(sequence, reason, self._clock())
        if self.failure is not None:
            sequence.error = f"the worker failed: {self.failure!r}"
        self.prefilled.append(sequence)

    def start_decode(self, sequences: list[Sequence]) -> None:
        """Let sequences go on whose prompt is computed."""
        started: list[int] = []
        for sequence in sequences:
            owner = self.find(sequence.request)
            if owner is None:  # ended or reclaimed on the way
                if not sequence.ended:
                    end_unstarted(sequence, FinishReason.CANCELLED, self._clock())
                self.decoded.append(sequence)
                continue
            if owner.lease.prefix_key is not None:  # nobody has committed it: let go those who wait for it
                self._leases.prefix_computed(sequence, owner.lease)
                self.leases_returned = True
            owner.decoding = True
            if sequence.request.cancelled:
                self.end(owner, FinishReason.CANCELLED)
                continue
            if sequence.embedding is not None:  # all that was asked for
                self.end(owner, FinishReason.STOP)
                continue
            if sequence.request.stream:
                for slot in owner.slots:
                    self.collector.emit_first(slot, self.decoded)
            started += owner.slots
        slots = np.array(started, np.int64)
        lost = self._table.num_blocks[slots] == 0
        self._table.state[slots] = np.where(lost, int(RowState.PREEMPTED), int(RowState.DECODE))
        self.end_rows(self.collector.find_ended(slots))

    # -- out ---------------------------------------------------------------------------------------------------------

    def end_rows(self, endings: list[Ending]) -> None:
        """Fill the rows' choices, commit what may be reused, give blocks and slots back; maybe end their sequences."""
        if not endings:
            return
        self.before_end(endings)
        table = self._table
        self.collector.fill_choices(endings)
        self._commit_outputs(endings)
        slots = [slot for slot, _ in endings]
        self._blocks.forget(slots)
        finished: list[ResidentSequence] = []
        for slot in slots:
            row = table.rows[slot]
            assert row is not None
            owner = row.owner
            if row.choice.index == 0 and len(owner.lease.fork_blocks):
                self._kv.release(owner.lease.fork_blocks)
                owner.lease.fork_blocks = np.empty(0, np.int32)
            self._executor.release(slot)
            owner.slots = [other for other in owner.slots if other != slot]
            if not owner.slots:
                finished.append(owner)
        table.vacate(slots)
        self._leases.give_back_slots(slots)
        self.leases_returned = True
        for owner in finished:
            self._finish(owner)

    def _commit_outputs(self, endings: list[Ending]) -> None:
        table = self._table
        commits: list[Commit] = []
        for slot, reason in endings:
            row = table.rows[slot]
            assert row is not None
            owner = row.owner
            if owner.lease.commit_outputs and owner.decoding and reason in (FinishReason.STOP, FinishReason.LENGTH):
                # The last output's KV was never computed: it was nobody's input.
                count = int(table.prompt_len[slot] + table.outputs_read[slot]) - 1
                if count <= table.prompt_len[slot] or table.computed[slot] < count:
                    continue  # nothing to add to the prompt, or lost after the last token had been read
                commits.append(Commit(table.tokens(slot, count), table.row_blocks(slot), namespace_of(owner.sequence)))
        self._kv.commit_all(commits)

    def _finish(self, owner: ResidentSequence) -> None:
        sequence = owner.sequence
        del self._owners[id(sequence.request)]
        self._leases.end(sequence, owner.lease)
        sequence.timings.finished = self._clock()
        sequence.kv = None
        if owner.decoding:
            self.decoded.append(sequence)
        elif not owner.posted:
            self.prefilled.append(sequence)

    def end(self, owner: ResidentSequence, reason: FinishReason) -> None:
        """End what is left of a sequence."""
        self.end_rows([(slot, reason) for slot in owner.slots])

    def cancel(self, requests: list[Request]) -> None:
        """End these; what is on its way between the doors is ended by decode."""
        for request in requests:
            owner = self.find(request)
            if owner is not None and not (owner.posted and not owner.decoding):
                self.end(owner, FinishReason.CANCELLED)

    def reclaim(self, requests: list[Request]) -> None:
        """End these, and give them back to nobody."""
        for request in requests:
            owner = self.find(request)
            if owner is not None:
                owner.posted, owner.decoding = True, False
                self.end(owner, FinishReason.CANCELLED)

    def let_go(self, sequences: list[Sequence]) -> None:
        """Forget sequences that go on elsewhere, and give back what they hold here."""
        for sequence in sequences:
            owner = self._owners.pop(id(sequence.request), None)
            if owner is None:
                continue
            slots = owner.slots
            self._blocks.forget(slots)
            self.collector.forget(slots)
            for slot in slots:
                self._executor.release(slot)
            self._table.vacate(slots)
            self._leases.give_back_slots(slots)
            self._leases.let_go(sequence, owner.lease)
        self.leases_returned = True

    def end_overdue(self) -> None:
        """End those whose time is over."""
        table = self._table
        now = self._clock()
        for slot in np.flatnonzero(table.timeout < now).tolist():
            row = table.rows[slot]
            if row is None:
                continue
            if row.owner.posted and not row.owner.decoding:
                continue  # on its way between the doors: decode ends it
            end = self.timeouts.end_of_running(row.owner.sequence)
            if end.at < now:
                self.end(row.owner, end.reason)
            else:
                table.timeout[slot] = end.at  # its first token has come

    # -- when something fails ----------------------------------------------------------------------------------------

    def start_over(self) -> None:
        """The device has lost everything: tell it again of every row, up to the outputs that were read."""
        for owner in self:
            for slot in owner.slots:
                row = self._table.rows[slot]
                assert row is not None
                self._executor.admit(slot, owner.sequence, row.choice.index)
                readmit(self._executor, self._table, slot)
            if not owner.posted:
                owner.lease.generation = self._kv.generation

    def end_planned(self, plan: StepPlan, error: Exception) -> None:
        """A step has failed: end the sequences that it was for."""
        planned = {chunk.slot: chunk.epoch for chunk in plan.chunks}
        planned.update(zip(plan.sample_slots.tolist(), plan.sample_epochs.tolist(), strict=True))
        rows = [self._table.rows[slot] for slot, epoch in planned.items() if self._table.epoch[slot] == epoch]
        owners = {id(row.owner): row.owner for row in rows if row is not None}
        for owner in owners.values():
            owner.sequence.error = f"{type(error).__name__}: {error}"
            self.end(owner, FinishReason.ERROR)

    def end_failed(self, plan: StepPlan, errors: dict[int, str]) -> None:
        """End the sequences of rows of a step, by their index among those sampled, for which it tells an error."""
        for index, error in errors.items():
            slot = plan.sample_slots[index]
            row = self._table.rows[slot]
            if row is not None and self._table.epoch[slot] == plan.sample_epochs[index]:
                row.owner.sequence.error = error
                self.end(row.owner, FinishReason.ERROR)

    def abandon(self) -> None:
        """The worker has failed: end everything. Every sequence goes back, also where the books here are wrong."""
        for owner in self:
            owner.sequence.error = f"the worker failed: {self.failure!r}"
            back: list[Any] = self.decoded if owner.decoding else self.prefilled
            self.give_up(partial(self.end, owner, FinishReason.ERROR), [owner.sequence], back)

    def give_up(self, end: Callable[[], None], sequences: list[Sequence], back: list[Any]) -> None:
        """End sequences of a failed worker by `end`; where that fails too, without the books."""
        try:
            end()
        except Exception:
            log.exception("the books of the failed worker are wrong")
            for sequence in sequences:
                end_unstarted(sequence, FinishReason.ERROR, self._clock())
                sequence.error = f"the worker failed: {self.failure!r}"
            back += sequences


def readmit(executor: Executor, table: ResidentTable, slot: int) -> None:
    """Of a row whose KV is computed again the device is to know what was read of it, and no more."""
    executor.readmit(slot, table.outputs[slot, : table.outputs_read[slot]])
