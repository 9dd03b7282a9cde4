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

from ...config import SchedulerPolicy
from ...errors import EngineClosedError, ExecutorLostError
from ...records import FinishReason
from ..scheduler.planner import Planner
from ..scheduler.prompt_turns import DecodeTurns, PromptTurns
from ..scheduler.resident import ResidentTable, RowState
from ..scheduler.row_blocks import MustReadFirst, RowBlocks
from ..scheduler.slo import make_chunk_budget
from ..scheduler.time_share import StepShares, TimeShare
from ..scheduler.timeouts import Timeouts
from .losses import MAX_LOSSES, note_loss
from .residents import Residents, readmit

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...config import SchedulerConfig
    from ...kv_runtime.cache import KVCache
    from ...records import Request, Sequence
    from ..scheduler.lease import LeaseBook
    from ..scheduler.plan import StepPlan, StepResult
    from ..scheduler.slo import StepSeconds
    from .collector import MakeStopMatcher
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
        self.on_submitted: Callable[[], None] = lambda: None  # or `wake` was called
        self.workers = [self]
        self.steps = 0
        self._losses = 0
        self._executor = executor
        self._kv = kv
        self._leases = leases
        self._clock = clock
        self._depth = 2 if scheduler.launch_ahead else 1
        self._table = ResidentTable(scheduler.num_slots, max_seq_len, leases.block_size)
        self._chunk_budget = make_chunk_budget(scheduler, step_cost, leases.block_size)
        self._busy_since = 0.0  # since when the device has been at the oldest step that is unread
        self.blocks = RowBlocks(
            self._table, kv, leases.policy.rank, partial(readmit, executor, self._table), self._leases_in_transit
        )
        is_fair, weights = scheduler.policy is SchedulerPolicy.FAIR_SHARE, scheduler.tenant_weights
        may_end_turns = is_fair and scheduler.time_shares is not None and scheduler.tpot_slo_ms is None
        self.planner = Planner(
            self._table,
            self.blocks,
            max_step_tokens,
            scheduler.max_prefill_batch,
            scheduler.max_decode_batch,
            time_share=TimeShare(*shares) if (shares := scheduler.time_shares) else None,
            chunk_budget=self._chunk_budget,
            prompt_turns=PromptTurns(weights) if is_fair else None,
            step_shares=StepShares(weights) if may_end_turns else None,
            decode_turns=DecodeTurns(weights) if is_fair else None,
        )
        self._residents = Residents(
            self._table, self.blocks, executor, kv, leases, Timeouts.of(scheduler), make_stop_matcher, clock
        )
        self._unread: deque[tuple[StepPlan, StepHandle]] = deque()
        self._inbox: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._wakeup = Condition()
        self._woken = False

    # -- from any thread ---------------------------------------------------------------------------------------------

    def submit_prefill(self, sequences: list[Sequence]) -> None:
        """Hand over sequences that hold a lease; `on_prefilled` gets each of them back.

        Raises:
            EngineClosedError: the worker has failed.
        """
        self._put(self._residents.admit, sequences)

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
        self._put(self._residents.cancel, requests)

    def reclaim(self, requests: list[Request]) -> None:
        """Take back the leases of requests that ended outside the worker (an operator dropped their record)."""
        resident = [request for request in requests if self._residents.find(request) is not None]
        if resident and self.failure is None:
            self._put(self._residents.reclaim, resident)

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
        """End a `wait_for_work`, or the next one if none is under way: there may be something to do."""
        with self._wakeup:
            self._woken = True
            self._wakeup.notify()
        self.on_submitted()

    @property
    def idle_limit_s(self) -> float | None:
        """How long to idle at most: sequences that stand still may meet a deadline, or blocks that nobody told of."""
        return 0.05 if len(self._residents) else None

    # -- the step loop -----------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Launch a step, read what is old enough, give results back; False when idle."""
        launched = self.launch()
        if reads := bool(self._unread) and (not launched or self.is_full):
            self.read_oldest()
        worked = launched or reads or bool(self._residents.prefilled or self._residents.decoded)
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
        self._residents.end_overdue()
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
            self._residents.leases_returned = True
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
                self._residents.end_planned(plan, error)
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
            self._residents.end_planned(plan, error)
            return
        self._unread.popleft()
        self._losses = 0
        if self._chunk_budget is not None:
            now = self._clock()
            self._chunk_budget.observe(plan, now - self._busy_since)
            self._busy_since = now
        self._apply(plan, result)

    def _start_decode(self, sequences: list[Sequence]) -> None:
        self._residents.start_decode(sequences)

    def _apply(self, plan: StepPlan, result: StepResult) -> None:
        self._residents.end_failed(plan, result.failed_rows)
        self._residents.collector.collect(plan, result, self._residents.prefilled, self._residents.decoded)

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
        log.warning("%s: %d sequences are computed again from where they were", error, len(self._residents))
        deadly = note_loss([plan for plan, _ in self._unread], self._table)
        self._unread.clear()
        self._kv.lose()
        self._residents.start_over()
        self.blocks.lose_kv()
        for owner in deadly:
            owner.sequence.error = f"{error}; {owner.losses} times while this was computed"
            self._residents.end(owner, FinishReason.ERROR)
        self._pause_leases()

    def _pause_leases(self) -> None:
        """While a row is preempted nobody is granted a lease; who waits is told when that is over."""
        paused, self._leases.paused = self._leases.paused, self.blocks.has_preempted
        self._residents.leases_returned |= paused and not self._leases.paused

    def post(self) -> None:
        """Give back what has come out of the steps."""
        if self._residents.prefilled:
            prefilled, self._residents.prefilled = self._residents.prefilled, []
            self.on_prefilled(prefilled)
        if self._residents.decoded:
            decoded, self._residents.decoded = self._residents.decoded, []
            self.on_decoded(decoded)
        if self._residents.leases_returned:
            self._residents.leases_returned = False
            self.on_leases_returned()

    def abandon(self, error: BaseException) -> None:
        """The loop itself failed: end everything resident with an error and refuse what comes.

        Every sequence comes back, also where the worker's own books are wrong.
        """
        residents = self._residents
        with self._wakeup:
            residents.failure = error
            left, self._inbox = self._inbox, deque()
        for handler, argument in left:
            if handler == residents.admit:
                new = [sequence for sequence in argument if residents.find(sequence.request) is None]
                residents.give_up(partial(residents.admit, new), new, residents.prefilled)
            elif handler == self._start_decode:
                residents.give_up(partial(self._start_decode, argument), argument, residents.decoded)
            else:
                residents.give_up(partial(handler, argument), [], residents.decoded)
        residents.abandon()
        self._leases.paused = False  # nobody resumes any more: who waits for a lease is to hear of the failure
        self._residents.leases_returned = True
        self.post()
        for _, step in self._unread:  # whoever waits for the steps launched so far must see their end
            with suppress(Exception):
                step.result()
        self._unread.clear()

    # -- for whoever foresees steps that are all alike (`runtime/simulation`) -----------------------------------------

    @property
    def is_steady(self) -> bool:
        """Whether the next step is planned from the resident rows alone: nothing waits to come in, to go out, or for
        blocks."""
        residents, waits = self._residents, self._inbox or self._leases.claim is not None or self.blocks.has_preempted
        goes = residents.prefilled or residents.decoded or residents.leases_returned
        return not (waits or goes or self.blocks.copies)

    @property
    def table(self) -> ResidentTable:
        return self._table

    @property
    def leases(self) -> LeaseBook:
        return self._leases

    @property
    def unread(self) -> deque[tuple[StepPlan, StepHandle]]:
        """Steps that were launched and not read."""
        return self._unread

    def advance(self, ends: list[float], estimates: list[float]) -> None:
        """As many steps that only decode have been launched, and as many been read, at `ends`, as one by one."""
        self.steps += len(ends)
        self.planner.advance(len(ends))
        if self._chunk_budget is not None:
            for end, estimate in zip(ends, estimates, strict=True):
                self._chunk_budget.follow(end - self._busy_since, estimate)
                self._busy_since = end

    def _leases_in_transit(self) -> bool:
        return self._leases.any_in_transit or self._table.has(RowState.HELD)

    @property
    def failure(self) -> BaseException | None:
        """What ended the worker for good."""
        return self._residents.failure

    @property
    def num_running(self) -> int:
        """Sequences on the worker."""
        return len(self._residents)

    @property
    def preemptions(self) -> int:
        """Rows that lost their blocks so far."""
        return self.blocks.preemptions


def _nobody(records: list[Any]) -> None:
    raise EngineClosedError(f"nobody takes {len(records)} records from the worker: the pipeline has no such door")
