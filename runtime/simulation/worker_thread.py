"""A worker's thread in virtual time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .repetition import foresee
from .virtual_time import LAST

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..worker.worker import Worker
    from .executor import SimulatedExecutor
    from .repetition import Repetition
    from .virtual_time import VirtualTime


class WorkerThread:
    """Calls a worker as its thread does in the real run; where that would wait for the device, virtual time passes.

    Steps that are all alike are not taken one by one, unless `repeats` is False: they have been once somebody who could
    tell calls `catch_up`. `before_event` is called before the thread does anything, with the rank of what it does.
    """

    def __init__(
        self,
        worker: Worker,
        executor: SimulatedExecutor,
        time: VirtualTime,
        before_event: Callable[[int], None],
        *,
        repeats: bool,
    ) -> None:
        self.rank = time.take_rank()
        self._worker = worker
        self._executor = executor
        self._time = time
        self._before_event = before_event
        self._repeats = repeats
        self._repetition: Repetition | None = None
        self._waits = 0  # for a step to end: the number of the newest
        self._idle_since: float | None = time.now
        worker.on_submitted = self.wake

    def wake(self) -> None:
        """Something was submitted."""
        if self._idle_since is not None:
            self._idle_since = None
            self._time.call_later(0.0, self._start)

    def catch_up(self, rank: int) -> None:
        """Something of this rank is about to happen that may touch the worker: what comes before it must have been."""
        repetition = self._repetition
        if repetition is not None:
            self._repetition = None
            repetition.advance(repetition.count(self._time.now, inclusive=self.rank < rank))
            self._wait(self._executor.oldest_end)

    def _start(self) -> None:
        self._before_event(LAST)
        self._launch()

    def _launch(self) -> None:
        worker = self._worker
        while worker.launch() and not worker.is_full:
            worker.post()
        if worker.num_unread:
            self._repetition = foresee(worker, self._executor, self._time) if self._repeats else None
            repeated = self._repetition
            self._wait(self._executor.oldest_end if repeated is None else float(repeated.ends[repeated.steps]))
            return
        worker.post()
        self._idle_since = self._time.now
        if worker.idle_limit_s is not None:
            self._time.call_later(worker.idle_limit_s, partial(self._look_again, self._idle_since))

    def _wait(self, until: float) -> None:
        self._waits += 1
        self._time.call_at(until, partial(self._read, self._waits), self.rank)

    def _read(self, wait: int) -> None:
        if wait != self._waits:
            return  # it had to catch up meanwhile
        repetition, self._repetition = self._repetition, None
        if repetition is not None:
            repetition.advance(repetition.steps)
        self._before_event(self.rank)
        self._worker.read_oldest()
        self._worker.post()
        self._launch()

    def _look_again(self, idle_since: float) -> None:
        if self._idle_since == idle_since:
            self.wake()
