"""Prefill and decode apart (mode `strict`): workers that compute prompts, workers that decode, and the two as one."""

from __future__ import annotations

from collections import defaultdict, deque
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EngineClosedError
from ...kv_runtime.pool import NO_BLOCKS
from ...records import FinishReason, Sequence
from ..scheduler.resident import ResidentSequence, Row, RowState
from .worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ...errors import ExecutorLostError
    from ...records import Request
    from ..scheduler.handover import DecodeLeases
    from ..scheduler.lease import Lease
    from ..scheduler.plan import StepPlan, StepResult
    from .collector import Ending


class PrefillWorker(Worker):
    """Computes prompts and their first tokens, and sends their KV to the worker that goes on, chunk by chunk.

    A sequence is given back when its KV has arrived, or could not be sent. With `fails_with_transfer` it then ends with
    an error, else the other worker computes the prompt itself. Rows stay until `submit_release`, so that their KV can
    be committed.
    """

    fails_with_transfer = False

    def submit_release(self, sequences: list[Sequence]) -> None:
        """Another worker has these sequences: give back what they hold here.

        Raises:
            EngineClosedError: the worker has failed.
        """
        self._put(self._residents.let_go, sequences)

    def _apply(self, plan: StepPlan, result: StepResult) -> None:
        for index, error in result.failed_exports.items():
            export = plan.exports[index]
            row = self._table.rows[export.slot]
            if row is None or self._table.epoch[export.slot] != export.epoch:
                continue  # it has ended meanwhile
            owner = row.owner
            assert owner.lease.handover is not None
            owner.lease.handover.error = error
            if self.fails_with_transfer:
                self._fail_handover(owner, error)
        super()._apply(plan, result)

    def _recover(self, error: ExecutorLostError) -> None:
        unread = [plan for plan, _ in self._unread]
        super()._recover(error)
        for export in chain.from_iterable(plan.exports for plan in unread) if self.fails_with_transfer else ():
            row = self._table.rows[export.slot]
            if row is not None and self._table.epoch[export.slot] == export.epoch:
                self._fail_handover(row.owner, str(error))
        self._pause_leases()

    def _fail_handover(self, owner: ResidentSequence, error: str) -> None:
        owner.sequence.error = f"its KV could not be handed over to decode: {error}"
        self._residents.end(owner, FinishReason.ERROR)

    def post(self) -> None:
        for sequence in self._residents.prefilled:
            owner = self._residents.find(sequence.request)
            for slot in owner.slots if owner is not None else ():
                row = self._table.rows[slot]
                assert row is not None
                row.choice.output_tokens = self._table.outputs[slot, : self._table.outputs_read[slot]].tolist()
        super().post()


class DecodeWorker(Worker):
    """Decodes sequences whose prompt a prefill worker has computed; what did not arrive it computes itself.

    Free blocks are granted to prompts, and other workers write to them: not in the order of this one's steps. So a
    block that a step may still use, though its row has ended, is kept until that step has been read.
    """

    _leases: DecodeLeases

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._residents.before_end = self._keep_blocks_of
        self._leases.on_freed = self._blocks_freed
        self._kept: deque[tuple[int, NDArray[np.int32]]] = deque()  # until so many steps have been read

    def launch(self) -> bool:
        steps = self.steps
        launched = super().launch()
        if self.steps > steps:
            self._keep(np.array([source for source, _ in self._unread[-1][0].copies], np.int32))
        return launched

    def read_oldest(self) -> None:
        super().read_oldest()
        self._let_go_of_read()

    def _recover(self, error: ExecutorLostError) -> None:
        super()._recover(error)
        self._let_go_of_read()

    def abandon(self, error: BaseException) -> None:
        super().abandon(error)
        self._let_go_of_read()

    def _keep_blocks_of(self, endings: list[Ending]) -> None:
        if self._unread:
            self._keep(self._table.all_blocks([slot for slot, _ in endings]))

    def _keep(self, blocks: NDArray[np.int32]) -> None:
        if len(blocks):
            self._kv.retain(blocks)
            self._kept.append((self.steps, blocks))

    def _blocks_freed(self) -> None:
        """By somebody else: rows that were preempted here may wait for them, too."""
        self.on_leases_returned()
        if self.blocks.has_preempted:
            self.wake()

    def _let_go_of_read(self) -> None:
        read = self.steps - len(self._unread)
        while self._kept and self._kept[0][0] <= read:
            self._kv.release(self._kept.popleft()[1])
            self._residents.leases_returned = True

    @property
    def is_steady(self) -> bool:
        return super().is_steady and not self._kept

    def _start_decode(self, sequences: list[Sequence]) -> None:
        lost = [owner for owner in map(self._take_over, sequences) if owner is not None and not owner.lease.blocks.size]
        super()._start_decode(sequences)
        slots = list(chain.from_iterable(owner.slots for owner in lost))
        self._table.state[slots] = RowState.PREEMPTED
        self._table.target[slots] = self._table.prompt_len[slots] + self._table.outputs_read[slots]

    def _take_over(self, sequence: Sequence) -> ResidentSequence | None:
        """Enter a sequence as if its prompt had been computed here; None if its lease was reclaimed on the way."""
        sent: Lease = sequence.kv
        assert sent.handover is not None
        lease = sent.handover.lease
        owner = ResidentSequence(sequence, lease, lease.slots, posted=True)
        if not self._residents.enter(owner):
            return None
        lease.commit_outputs = sent.commit_outputs
        sequence.kv = lease
        for slot, choice in zip(lease.slots, sequence.choices, strict=True):
            self._enter(slot, Row(owner, choice))
        if sent.handover.has_arrived(sequence):
            first, *others = lease.slots
            self._table.set_blocks(first, lease.blocks)
            self._table.computed[first] = self._table.prompt_len[first]
            if others:
                self.blocks.fork(first, others)
        else:
            self._kv.release(lease.blocks)
            self._kv.release(lease.fork_blocks)
            lease.blocks = lease.fork_blocks = NO_BLOCKS
        return owner

    def _enter(self, slot: int, row: Row) -> None:
        table, sequence = self._table, row.owner.sequence
        tokens = np.array(row.choice.output_tokens, np.int32)
        table.occupy(slot, row, RowState.HELD, self._residents.timeouts.end_of_running(sequence).at)
        table.outputs[slot, : len(tokens)] = tokens
        table.outputs_read[slot] = table.launched[slot] = len(tokens)
        table.first_time[slot] = table.last_time[slot] = sequence.timings.first_token
        self._residents.collector.watch(slot, sequence, row.choice.conforms)
        self._residents.collector.push(slot, row.choice.output_tokens)
        self._executor.admit(slot, sequence, row.choice.index)
        self._executor.readmit(slot, tokens)


class DisaggregatedWorkers:
    """Prefill and decode workers behind the two doors of one `Worker`, whose interface this is."""

    def __init__(self, prefill: list[PrefillWorker], decode: list[DecodeWorker]) -> None:
        self._prefill = prefill
        self._decode = decode
        self.workers: list[Worker] = [*prefill, *decode]

    def submit_prefill(self, sequences: list[Sequence]) -> None:
        """See `Worker.submit_prefill`."""
        for index, share in _group(sequences, lambda sequence: sequence.kv.worker):
            self._prefill[index].submit_prefill(share)

    def submit_decode(self, sequences: list[Sequence]) -> None:
        """See `Worker.submit_decode`."""
        staying = [sequence for sequence in sequences if sequence.kv.handover is None]  # pooled: nothing is decoded
        going = [sequence for sequence in sequences if sequence.kv.handover is not None]
        for sequence in going:
            book = sequence.kv.handover.book
            book.expect(sequence.request)  # first: from here on its lease is found there
        arriving = _group(going, lambda sequence: sequence.kv.handover.book.worker)
        for index, share in _group(staying, lambda sequence: sequence.kv.worker):
            self._prefill[index].submit_decode(share)
        for index, share in _group(going, lambda sequence: sequence.kv.worker):
            self._prefill[index].submit_release(share)
        for index, share in arriving:
            self._decode[index].submit_decode(share)

    def cancel(self, requests: list[Request]) -> None:
        """See `Worker.cancel`. What a failed worker had has ended."""
        for worker in self.workers:
            with suppress(EngineClosedError):
                worker.cancel(requests)

    def reclaim(self, requests: list[Request]) -> None:
        """See `Worker.reclaim`."""
        for worker in self.workers:
            worker.reclaim(requests)

    def limit_prefill(self, max_batch: int) -> None:
        """See `Worker.limit_prefill`."""
        for worker in self._prefill:
            worker.limit_prefill(max_batch)

    def limit_decode(self, max_batch: int) -> None:
        """See `Worker.limit_decode`."""
        for worker in self._decode:
            worker.limit_decode(max_batch)

    @property
    def on_prefilled(self) -> Callable[[list[Any]], None]:
        """Takes the sequences whose prompt was computed."""
        return self.workers[0].on_prefilled

    @on_prefilled.setter
    def on_prefilled(self, take: Callable[[list[Any]], None]) -> None:
        for worker in self.workers:
            worker.on_prefilled = take

    @property
    def on_decoded(self) -> Callable[[list[Any]], None]:
        """Takes the sequences that ended, and deltas."""
        return self.workers[0].on_decoded

    @on_decoded.setter
    def on_decoded(self, take: Callable[[list[Any]], None]) -> None:
        for worker in self.workers:
            worker.on_decoded = take

    @property
    def on_leases_returned(self) -> Callable[[], None]:
        """Called whenever slots or blocks have become free."""
        return self.workers[0].on_leases_returned

    @on_leases_returned.setter
    def on_leases_returned(self, wake: Callable[[], None]) -> None:
        for worker in self.workers:
            is_prefill = isinstance(worker, PrefillWorker)
            worker.on_leases_returned = wake if is_prefill else partial(self._decode_leases_returned, wake)

    def _decode_leases_returned(self, wake: Callable[[], None]) -> None:
        """Also prompts that were preempted may wait for blocks on this side."""
        wake()
        for worker in self._prefill:
            if worker.blocks.has_preempted:
                worker.wake()

    @property
    def steps(self) -> int:
        return sum(worker.steps for worker in self.workers)

    @property
    def num_running(self) -> int:
        """Sequences on any of the workers."""
        return sum(worker.num_running for worker in self.workers)

    @property
    def preemptions(self) -> int:
        """Rows that lost their blocks so far."""
        return sum(worker.preemptions for worker in self.workers)


def _group(sequences: list[Sequence], key: Callable[[Sequence], int]) -> list[tuple[int, list[Sequence]]]:
    groups: dict[int, list[Sequence]] = defaultdict(list)
    for sequence in sequences:
        groups[key(sequence)].append(sequence)
    return [*groups.items()]
