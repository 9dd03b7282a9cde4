"""A thread that waits in virtual time."""

from __future__ import annotations

from collections import deque
from threading import Semaphore, Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .virtual_time import VirtualTime

    Job = Callable[[], object]


class _Closed(BaseException):
    """Ends a job that nobody waits for any more."""


class VirtualThread:
    """Runs jobs one after the other. It and the event loop take turns, so that jobs are as deterministic as events.

    `before_turn` is called, by the event loop, before the thread goes on. `close` must be called in the end.
    """

    def __init__(self, time: VirtualTime, before_turn: Callable[[], None]) -> None:
        self._time = time
        self._before_turn = before_turn
        self._jobs: deque[Job] = deque()
        self._is_busy = False
        self._is_closed = False
        self._error: BaseException | None = None
        self._go, self._back = Semaphore(0), Semaphore(0)
        self._thread: Thread | None = None

    def submit(self, job: Job) -> None:
        """Run a job once those before it have ended; it begins with an event of its own."""
        self._jobs.append(job)
        if not self._is_busy:
            self._is_busy = True
            self._time.call_later(0.0, self._take_turn)

    def sleep_until(self, moment: float) -> None:
        """Called by a job: let virtual time pass."""
        if moment > self._time.now:
            self._time.call_at(moment, self._take_turn)
            self._give_turn()

    def _take_turn(self) -> None:
        self._before_turn()
        if self._thread is None:
            self._thread = Thread(target=self._run, name="sagellm-virtual", daemon=True)
            self._thread.start()
        self._time.running = self
        self._go.release()
        self._back.acquire()
        self._time.running = None
        if self._error is not None:
            raise self._error

    def _give_turn(self) -> None:
        self._back.release()
        self._go.acquire()
        if self._is_closed:
            raise _Closed

    def _run(self) -> None:
        self._go.acquire()
        try:
            while not self._is_closed:
                while self._jobs:
                    self._jobs.popleft()()
                self._is_busy = False
                self._give_turn()
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        self._back.release()

    def close(self) -> None:
        """End the thread, wherever it is."""
        self._is_closed = True
        if self._thread is not None:
            self._go.release()
            self._thread.join()
            self._thread = None
