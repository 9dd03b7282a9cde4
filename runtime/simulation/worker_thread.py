"""A worker's thread in virtual time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..worker.worker import Worker
    from .executor import SimulatedExecutor
    from .virtual_time import VirtualTime


class WorkerThread:
    """Calls a worker as its thread does in the real run; where that would wait for the device, virtual time passes."""

    def __init__(self, worker: Worker, executor: SimulatedExecutor, time: VirtualTime) -> None:
        self._worker = worker
        self._executor = executor
        self._time = time
        self._idle_since: float | None = time.now
        worker.on_submitted = self.wake

    def wake(self) -> None:
        """Something was submitted."""
        if self._idle_since is not None:
            self._idle_since = None
            self._time.call_later(0.0, self._launch)

    def _launch(self) -> None:
        worker = self._worker
        while worker.launch() and not worker.is_full:
            worker.post()
        if worker.num_unread:
            self._time.call_at(self._executor.oldest_end, self._read)
            return
        worker.post()
        self._idle_since = self._time.now
        if worker.idle_limit_s is not None:
            self._time.call_later(worker.idle_limit_s, partial(self._look_again, self._idle_since))

    def _read(self) -> None:
        self._worker.read_oldest()
        self._worker.post()
        self._launch()

    def _look_again(self, idle_since: float) -> None:
        if self._idle_since == idle_since:
            self.wake()
