"""Steps that are all alike: what comes of them is known without taking them one by one.

While the same rows decode and nothing else happens, worker, planner and collector do the same in each step: every row
gets a token, and a KV block where its newest one begins. Such steps are foreseen, and written down all at once when
somebody looks. What they leave behind is to the last bit what they would leave one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..scheduler.resident import RowState

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..worker.worker import Worker
    from .executor import SimulatedExecutor
    from .virtual_time import VirtualTime

_FEWEST = 3  # fewer are sooner taken than foreseen
_MOST = 512  # of a row's many tokens: somebody will look before


def foresee(worker: Worker, executor: SimulatedExecutor, time: VirtualTime) -> Repetition | None:
    """What a worker that has just launched a step will do if it is left alone; None where that is nothing to foresee:
    the next step is not like those that are unread, or hardly any are."""
    plans = [plan for plan, _ in worker.unread]
    if any(plan.chunks or plan.copies for plan in plans) or not (worker.is_full and worker.is_steady):
        return None
    table, slots = worker.table, worker.table.decoding()
    if not len(slots) or table.has(RowState.PREFILL) or table.watched[slots].any():
        return None
    if any(not np.array_equal(plan.decode_slots, slots) for plan in plans):
        return None
    if (table.epoch[slots] != plans[0].sample_epochs).any():
        return None
    if (table.stop_ids[slots] == executor.tokens[slots, None]).any():
        return None
    steps = min(_MOST, int((table.max_outputs[slots] - table.launched[slots]).min()))
    if steps < _FEWEST:
        return None
    repetition = Repetition(worker, executor, time, slots, steps)
    return repetition if repetition.steps >= _FEWEST else None


class Repetition:
    """At most `steps` times: the oldest unread step is read, and one more like it is launched.

    The n-th time is at `ends[n - 1]`, when that step has run; the unread steps U come first in `ends` [U + steps].
    """

    def __init__(
        self,
        worker: Worker,
        executor: SimulatedExecutor,
        time: VirtualTime,
        slots: NDArray[np.int64],
        steps: int,
    ) -> None:
        self._worker = worker
        self._executor = executor
        self._time = time
        self._slots = slots  # [D]
        self._computed = worker.table.computed[slots]
        self._num_blocks = worker.table.num_blocks[slots]
        self._find_extensions(steps)
        steps = self._within_room(steps)
        self._seconds, self.ends = executor.foresee(len(slots), int(self._computed.sum()), steps)
        self.steps = min(steps, int(self.ends.searchsorted(worker.table.timeout.min(), side="right")))
        if worker.leases.tiers is not None:
            self.steps = min(self.steps, int(self.ends.searchsorted(worker.leases.tiers.next_pass)))

    def _find_extensions(self, steps: int) -> None:
        """Note which rows need one more block in which step, by step and then by row."""
        size = self._worker.table.block_size
        room = self._num_blocks * size - self._computed
        counts = np.maximum(0, -((room - steps) // size))
        rows = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        at = room[rows] + nth * size + 1
        order = np.argsort(at, kind="stable")
        self._extended, self._nth, self._extended_at = rows[order], nth[order], at[order]

    def _within_room(self, steps: int) -> int:
        """As many of the steps as there are blocks for. What is given up for them is saved by tiers before the next
        step, which takes time: with tiers, blocks are free ones."""
        kv, tiered = self._worker.blocks.kv, self._worker.leases.tiers is not None
        room = kv.num_free if tiered else kv.available()
        return steps if len(self._extended_at) <= room else min(steps, int(self._extended_at[room]) - 1)

    def count(self, until: float, *, inclusive: bool) -> int:
        """How many of the steps come before `until`, or then."""
        return min(self.steps, int(self.ends.searchsorted(until, side="right" if inclusive else "left")))

    def advance(self, steps: int) -> None:
        """Let so many of the steps have been. Only once: what follows is to be foreseen anew."""
        if not steps:
            return
        worker, table, slots = self._worker, self._worker.table, self._slots
        self._extend(int(self._extended_at.searchsorted(steps, side="right")))
        count = table.outputs_read[slots]
        table.outputs[slots[:, None], count[:, None] + np.arange(steps)] = self._executor.tokens[slots, None]
        table.outputs_read[slots] = count + steps
        table.computed[slots] += steps
        table.launched[slots] += steps
        table.last_time[slots] = self.ends[steps - 1]
        for plan, _ in worker.unread:
            plan.decode_positions = plan.decode_positions + steps
            plan.sample_steps = plan.sample_steps + steps  # its block tables have been with the device: nobody asks
        self._executor.advance(slots, self._seconds, self.ends, steps)
        worker.advance(self.ends[:steps].tolist(), self._seconds[:steps].tolist())

    def _extend(self, count: int) -> None:
        """Allocate the first `count` blocks, those of one step at a time, and each step at its time."""
        if not count:
            return
        kv, table, time = self._worker.blocks.kv, self._worker.table, self._time
        now, at, fresh = time.now, self._extended_at[:count].tolist(), []
        begin = 0
        for end in range(1, count + 1):
            if end == count or at[end] != at[begin]:
                time.now = float(self.ends[at[begin] - 1])
                blocks = kv.allocate(end - begin)
                assert blocks is not None, "a repetition takes no more blocks than there are"
                fresh.append(blocks)
                begin = end
        time.now = now
        rows = self._extended[:count]
        table.blocks[self._slots[rows], self._num_blocks[rows] + self._nth[:count]] = np.concatenate(fresh)
        table.num_blocks[self._slots] += np.bincount(rows, minlength=len(self._slots))
