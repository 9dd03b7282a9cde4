"""The worker: one device, one resident table, one step loop.

`prefill` and `decode` are its two doors: operators put sequences in with `submit_prefill` and `submit_decode` (on the
flow's thread) and get lists back, one per step, through `on_prefilled` and `on_decoded` (on the worker's thread).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from contextlib import suppress
from functools import partial
from threading import Condition
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EngineClosedError, ExecutorLostError
from ...kv_runtime.cache import Commit
from ...records import Choice, FinishReason, Sequence, TokenDelta
from ..scheduler.lease import Lease, LeaseBook, namespace_of
from ..scheduler.planner import Planner
from ..scheduler.resident import ResidentSequence, ResidentTable, Row, RowState
from ..scheduler.row_blocks import MustReadFirst, RowBlocks
from ..scheduler.slo import make_chunk_budget
from ..scheduler.time_share import TimeShare
from ..scheduler.timeouts import Timeouts
from ..scheduler.waiting import end_unstarted
from .collector import Collector
from .losses import MAX_LOSSES, note_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...config import SchedulerConfig
    from ...kv_runtime.cache import KVCache
    from ...records import Request
    from ..scheduler.plan import StepPlan, StepResult
    from ..scheduler.slo import StepSeconds
    from .collector import Ending, MakeStopMatcher
    from .executor import Executor, StepHandle

log = logging.getLogger("sageLLM")


class Worker:
    """Runs steps while there is something to compute. Everything but `submit_*`, `cancel`, `reclaim`, `wake` and the
    planner's limits belongs to the thread (or task) that calls `step`."""

    def __init__(
        self,
        executor: Executor,
        kv: KVCache,
        leases: LeaseBook,
        scheduler: SchedulerConfig,
        max_seq_len: int,
        max_step_tokens: int,
        make_stop_matcher: MakeStopMatcher,
        clock: Callable[[], float] = time.monotonic,
        step_cost: StepSeconds | None = None,
    ) -> None:
        """`step_cost` is for `scheduler.tpot_slo_ms`, and needed where that is set.

        Raises:
            ConfigError: it is missing.
        """
        self.on_prefilled: Callable[[list[Any]], None] = _nobody
        self.on_decoded: Callable[[list[Any]], None] = _nobody
        self.on_leases_returned: Callable[[], None] = lambda: None
        self.on_submitted: Callable[[], None] = lambda: None
        self.failure: BaseException | None = None
        self.workers = [self]
        self.steps = 0
        self._losses = 0
        self._executor = executor
        self._kv = kv
        self._leases = leases
        self._clock = clock
        self._timeouts = Timeouts.of(scheduler)
        self._depth = 2 if scheduler.launch_ahead else 1
        self._table = ResidentTable(scheduler.num_slots, max_seq_len, leases.block_size)
        self._chunk_budget = make_chunk_budget(scheduler, step_cost, leases.block_size)
        self._busy_since = 0.0  # since when the device has been at the oldest step that is unread
        self.blocks = RowBlocks(self._table, kv, leases.policy.rank, self._forget_on_device, self._leases_in_transit)
        self.planner = Planner(
            self._table,
            self.blocks,
            max_step_tokens,
            scheduler.max_prefill_batch,
            min(scheduler.max_decode_batch, scheduler.max_batch_size),
            time_share=TimeShare(*shares) if (shares := scheduler.time_shares) else None,
            chunk_budget=self._chunk_budget,
        )
        self._collector = Collector(self._table, make_stop_matcher, self._end_rows, clock)
        self._unread: deque[tuple[StepPlan, StepHandle]] = deque()
        self._resident: dict[int, ResidentSequence] = {}  # by id of the request
        self._inbox: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._wakeup = Condition()
        self._woken = False
        self._returned = False
        self._prefilled: list[Sequence] = []
        self._decoded: list[Sequence | TokenDelta] = []

    # -- from any thread ---------------------------------------------------------------------------------------------

    def submit_prefill(self, sequences: list[Sequence]) -> None:
        """Hand over sequences that hold a lease; `on_prefilled` gets each of them back.

        Raises:
            EngineClosedError: the worker has failed.
        """
        self._put(self._admit, sequences)

    def submit_decode(self, sequences: list[Sequence]) -> None:
        """Hand over sequences whose prompt was computed; `on_decoded` gets each of them back, ended.

        Raises:
            EngineClosedError: the worker has failed.
        """
        self._put(self._start_decode, sequences)

    def cancel(self, requests: list[Request]) -> None:
        """End these requests within one step; they come back with finish reason `cancelled`."""
        for request in requests:
            request.cancelled = True
        self._put(self._cancel, requests)

    def reclaim(self, requests: list[Request]) -> None:
        """Take back the leases of requests that ended outside the worker (an operator dropped their record)."""
        resident = [request for request in requests if id(request) in self._resident]
        if resident and self.failure is None:
            self._put(self._reclaim, resident)

    def limit_prefill(self, max_batch: int) -> None:
        """From the next step on compute at most so many prompts at once."""
        self.planner.max_prefill_batch = max_batch

    def limit_decode(self, max_batch: int) -> None:
        """From the next step on give at most so many rows a token at once."""
        self.planner.max_decode_batch = max_batch

    def _put(self, handler: Callable[[Any], None], argument: Any) -> None:
        with self._wakeup:  # what gets into the inbox before `abandon` is answered by it
            if self.failure is not None:
                raise EngineClosedError(f"the worker has failed: {self.failure!r}")
            self._inbox.append((handler, argument))
            self._wakeup.notify()
        self.on_submitted()

    def wait_for_work(self) -> None:
        """Block the worker's thread until something is submitted, `wake` is called, or it is time to look again."""
        with self._wakeup:
            if not self._inbox and not self._woken:
                self._wakeup.wait(self.idle_limit_s)
            self._woken = False

    def wake(self) -> None:
        """End a `wait_for_work`, or the next one if none is under way."""
        with self._wakeup:
            self._woken = True
            self._wakeup.notify()

    @property
    def idle_limit_s(self) -> float | None:
        """How long to idle at most: sequences that stand still may meet a deadline, or blocks freed elsewhere."""
        return 0.05 if self._resident else None

    # -- the step loop -----------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Launch a step, read what is old enough, give results back; False when idle."""
        launched = self.launch()
        if reads := bool(self._unread) and (not launched or self.is_full):
            self.read_oldest()
        worked = launched or reads or bool(self._prefilled or self._decoded)
        self.post()
        return worked

    @property
    def is_full(self) -> bool:
        """Whether as many steps are launched as may be before the oldest is read."""
        return len(self._unread) >= self._depth

    @property
    def num_unread(self) -> int:
        """Steps that were launched and not read."""
        return len(self._unread)

    def launch(self) -> bool:
        """Take what was submitted, then plan and launch a step; False if there is none, or the unread come first."""
        while self._inbox:
            handler, argument = self._inbox[0]
            handler(argument)
            self._inbox.popleft()  # only now: what a failure leaves is answered by `abandon`
        self._end_overdue()
        if not self._is_ready():
            self._pause_leases()
            return False
        claim = self._leases.claim
        had_room = claim is not None and claim.has_room
        try:
            plan = self.planner.plan(len(self._unread), claim)
        except MustReadFirst:
            return False
        if claim is not None and claim.has_room and not had_room:
            self._returned = True
        self._pause_leases()
        if plan is None:
            return False
        if not self._unread:
            self._busy_since = self._clock()
        try:
            handle = self._executor.launch(plan)
        except Exception as error:  # the step is lost, the worker is not
            for export in plan.exports:
                export.done()
            if isinstance(error, ExecutorLostError):
                self._recover(error)
            else:
                self._fail_step(plan, error)
            return True
        self._unread.append((plan, handle))
        self.steps += 1
        return True

    def read_oldest(self) -> None:
        """Wait for the oldest step that is unread, and apply its results."""
        plan, handle = self._unread[0]
        try:
            result = handle.result()
        except ExecutorLostError as error:
            self._recover(error)
            return
        except Exception as error:
            self._unread.popleft()
            self._fail_step(plan, error)
            return
        self._unread.popleft()
        self._losses = 0
        if self._chunk_budget is not None:
            now = self._clock()
            self._chunk_budget.observe(plan, now - self._busy_since)
            self._busy_since = now
        self._apply(plan, result)

    def _apply(self, plan: StepPlan, result: StepResult) -> None:
        self._collector.collect(plan, result, self._prefilled, self._decoded)

    def _is_ready(self) -> bool:
        while True:
            try:
                return self._executor.ready()
            except ExecutorLostError as error:
                self._recover(error)

    def _recover(self, error: ExecutorLostError) -> None:
        """What the device knew is gone: every row starts again from the outputs that were read.

        Raises:
            ExecutorLostError: that has happened too often in a row.
        """
        self._losses += 1
        if self._losses > MAX_LOSSES:
            raise ExecutorLostError(f"{error}; {self._losses} times without a step in between") from error
        log.warning("%s: %d sequences are computed again from where they were", error, len(self._resident))
        deadly = note_loss([plan for plan, _ in self._unread], self._table)
        self._unread.clear()
        self._kv.lose()
        for owner in self._resident.values():
            for slot in owner.slots:
                row = self._table.rows[slot]
                assert row is not None
                self._executor.admit(slot, owner.sequence, row.choice.index)
                self._forget_on_device(slot)
            if not owner.posted:
                owner.lease.generation = self._kv.generation
        self.blocks.lose_kv()
        for owner in deadly:
            owner.sequence.error = f"{error}; {owner.losses} times while this was computed"
            self._end_sequence(owner, FinishReason.ERROR)
        self._pause_leases()

    def _pause_leases(self) -> None:
        """While a row is preempted nobody is granted a lease; who waits is told when that is over."""
        paused, self._leases.paused = self._leases.paused, self.blocks.has_preempted
        self._returned |= paused and not self._leases.paused

    def _fail_step(self, plan: StepPlan, error: Exception) -> None:
        planned = {chunk.slot: chunk.epoch for chunk in plan.chunks}
        planned.update(zip(plan.sample_slots.tolist(), plan.sample_epochs.tolist(), strict=True))
        rows = [self._table.rows[slot] for slot, epoch in planned.items() if self._table.epoch[slot] == epoch]
        owners = {id(row.owner): row.owner for row in rows if row is not None}
        for owner in owners.values():
            owner.sequence.error = f"{type(error).__name__}: {error}"
            self._end_sequence(owner, FinishReason.ERROR)

    def post(self) -> None:
        """Give back what has come out of the steps."""
        if self._prefilled:
            prefilled, self._prefilled = self._prefilled, []
            self.on_prefilled(prefilled)
        if self._decoded:
            decoded, self._decoded = self._decoded, []
            self.on_decoded(decoded)
        if self._returned:
            self._returned = False
            self.on_leases_returned()

    def abandon(self, error: BaseException) -> None:
        """The loop itself failed: end everything resident with an error and refuse what comes.

        Every sequence comes back, also where the worker's own books are wrong.
        """
        with self._wakeup:
            self.failure = error
            left, self._inbox = self._inbox, deque()
        for handler, argument in left:
            if handler == self._admit:
                new = [sequence for sequence in argument if id(sequence.request) not in self._resident]
                self._give_up(partial(self._admit, new), new, self._prefilled)
            elif handler == self._start_decode:
                self._give_up(partial(self._start_decode, argument), argument, self._decoded)
            else:
                self._give_up(partial(handler, argument), [], self._decoded)
        for owner in list(self._resident.values()):
            owner.sequence.error = f"the worker failed: {error!r}"
            back = self._decoded if owner.decoding else self._prefilled
            self._give_up(partial(self._end_sequence, owner, FinishReason.ERROR), [owner.sequence], back)
        self._leases.paused = False  # nobody resumes any more: who waits for a lease is to hear of the failure
        self._returned = True
        self.post()
        for _, step in self._unread:  # whoever waits for the steps launched so far must see their end
            with suppress(Exception):
                step.result()
        self._unread.clear()

    def _give_up(self, end: Callable[[], None], sequences: list[Sequence], back: list[Any]) -> None:
        try:
            end()
        except Exception:
            log.exception("the books of the failed worker are wrong")
            for sequence in sequences:
                end_unstarted(sequence, FinishReason.ERROR, self._clock())
                sequence.error = f"the worker failed: {self.failure!r}"
            back += sequences

    # -- rows enter --------------------------------------------------------------------------------------------------

    def _admit(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            lease = sequence.kv
            assert isinstance(lease, Lease)
            owner = ResidentSequence(sequence, lease, lease.slots)
            # Known here before it arrives: at every moment `LeaseBook.reclaim` or `_reclaim` finds the lease.
            self._resident[id(sequence.request)] = owner
            arrived = self._leases.arrive(sequence)
            if not arrived or sequence.request.cancelled or self.failure is not None:
                del self._resident[id(sequence.request)]
                self._refuse(sequence, lease if arrived else None)
                continue
            timeout = self._timeouts.end_of_running(sequence).at
            sequence.choices = [Choice(index) for index in range(len(lease.slots))]
            for slot, choice in zip(lease.slots, sequence.choices, strict=True):
                state = RowState.FORKING if choice.index else RowState.PREFILL
                self._table.occupy(slot, Row(owner, choice), state, timeout)
                self._collector.watch(slot, sequence)
                self._executor.admit(slot, sequence, choice.index)
            first = lease.slots[0]
            self._table.set_blocks(first, lease.blocks)
            self._table.computed[first] = lease.hit_tokens
            if lease.copy is not None:
                self.blocks.copies.add(lease.copy)
                lease.copy = None
            if lease.generation != self._kv.generation:  # what it was to reuse has been lost meanwhile
                lease.generation = self._kv.generation
                self.blocks.preempt(first)

    def _refuse(self, sequence: Sequence, lease: Lease | None) -> None:
        """Give a sequence back as it came; its lease, unless that was reclaimed, is free again."""
        if lease is not None:
            self._leases.give_back_unused(sequence, lease)
            self._returned = True
        reason = FinishReason.CANCELLED if self.failure is None else FinishReason.ERROR
        end_unstarted(sequence, reason, self._clock())
        if self.failure is not None:
            sequence.error = f"the worker failed: {self.failure!r}"
        self._prefilled.append(sequence)

    def _start_decode(self, sequences: list[Sequence]) -> None:
        started: list[int] = []
        for sequence in sequences:
            owner = self._resident.get(id(sequence.request))
            if owner is None:  # ended or reclaimed on the way
                if not sequence.ended:
                    end_unstarted(sequence, FinishReason.CANCELLED, self._clock())
                self._decoded.append(sequence)
                continue
            if owner.lease.prefix_key is not None:  # nobody has committed it: let go those who wait for it
                self._leases.prefix_computed(sequence, owner.lease)
                self._returned = True
            owner.decoding = True
            if sequence.request.cancelled:
                self._end_sequence(owner, FinishReason.CANCELLED)
                continue
            if sequence.request.stream:
                for slot in owner.slots:
                    self._collector.emit_first(slot, self._decoded)
            started += owner.slots
        slots = np.array(started, np.int64)
        lost = self._table.num_blocks[slots] == 0
        self._table.state[slots] = np.where(lost, int(RowState.PREEMPTED), int(RowState.DECODE))
        self._end_rows(self._collector.find_ended(slots))

    # -- rows leave --------------------------------------------------------------------------------------------------

    def _end_rows(self, endings: list[Ending]) -> None:
        """Fill the rows' choices, commit what may be reused, give blocks and slots back; maybe end their sequences."""
        if not endings:
            return
        table = self._table
        self._collector.fill_choices(endings)
        self._commit_outputs(endings)
        slots = [slot for slot, _ in endings]
        self.blocks.forget(slots)
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
        self._returned = True
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
        del self._resident[id(sequence.request)]
        self._leases.end(sequence, owner.lease)
        sequence.timings.finished = self._clock()
        sequence.kv = None
        if owner.decoding:
            self._decoded.append(sequence)
        elif not owner.posted:
            self._prefilled.append(sequence)

    def _end_sequence(self, owner: ResidentSequence, reason: FinishReason) -> None:
        self._end_rows([(slot, reason) for slot in owner.slots])

    def _cancel(self, requests: list[Request]) -> None:
        for request in requests:
            owner = self._resident.get(id(request))
            if owner is not None and not (owner.posted and not owner.decoding):
                self._end_sequence(owner, FinishReason.CANCELLED)

    def _reclaim(self, requests: list[Request]) -> None:
        for request in requests:
            owner = self._resident.get(id(request))
            if owner is not None:
                owner.posted, owner.decoding = True, False  # nobody is to get it back
                self._end_sequence(owner, FinishReason.CANCELLED)

    def _end_overdue(self) -> None:
        table = self._table
        now = self._clock()
        for slot in np.flatnonzero(table.timeout < now).tolist():
            row = table.rows[slot]
            if row is None:
                continue
            if row.owner.posted and not row.owner.decoding:
                continue  # on its way between the doors: decode ends it
            end = self._timeouts.end_of_running(row.owner.sequence)
            if end.at < now:
                self._end_sequence(row.owner, end.reason)
            else:
                table.timeout[slot] = end.at  # its first token has come

    def _forget_on_device(self, slot: int) -> None:
        table = self._table
        self._executor.readmit(slot, table.outputs[slot, : table.outputs_read[slot]])

    def _leases_in_transit(self) -> bool:
        return self._leases.any_in_transit or self._table.has(RowState.HELD)

    @property
    def num_running(self) -> int:
        """Sequences on the worker."""
        return len(self._resident)

    @property
    def preemptions(self) -> int:
        """Rows that lost their blocks so far."""
        return self.blocks.preemptions


def _nobody(records: list[Any]) -> None:
    raise EngineClosedError(f"nobody takes {len(records)} records from the worker: the pipeline has no such door")
