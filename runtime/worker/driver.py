"""Who calls `Worker.step`: a thread of its own (real devices), or a task on the flow's loop (no device to wait for)."""

from __future__ import annotations

import logging
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Protocol

import anyio

from ...errors import EngineClosedError, ExecutorLostError
from ..flow.mailbox import Mailbox

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from .worker import Worker

log = logging.getLogger("sageLLM")

TURNS_TO_A_CALLER = 8  # of the event loop: as many as a result needs from the worker to whoever waits for it


class Driver(Protocol):
    """Runs a worker's step loop between `start` and `stop`."""

    def start(self, tasks: TaskGroup) -> None:
        """Begin; `tasks` is the flow's task group."""
        ...

    def stop(self) -> None:
        """End after the current step, and wait for that where there is a thread."""
        ...


class ThreadDriver:
    """The step loop on a thread: the flow's loop never waits for the device."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._stopping = False
        self._thread = Thread(target=self._loop, name="sagellm-worker", daemon=True)

    def start(self, tasks: TaskGroup) -> None:
        self._thread.start()

    def _loop(self) -> None:
        try:
            while not self._stopping:
                if not self._worker.step():
                    self._worker.wait_for_work()
        except BaseException as error:
            _log_failure(error)
            self._worker.abandon(error)

    def stop(self) -> None:
        self._stopping = True
        self._worker.wake()
        if self._thread.is_alive():
            self._thread.join()
        if self._worker.failure is None:
            self._worker.abandon(EngineClosedError("the engine was shut down"))


class TaskDriver:
    """The step loop as a task: deterministic under a virtual clock, and no thread competes for the interpreter."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._submitted: Mailbox[None] = Mailbox()
        self._scope = anyio.CancelScope()
        worker.on_submitted = partial(self._submitted.put, ())

    def start(self, tasks: TaskGroup) -> None:
        tasks.start_soon(self._loop)

    async def _loop(self) -> None:
        with self._scope:
            try:
                while True:
                    if self._worker.step():
                        for _ in range(TURNS_TO_A_CALLER):
                            await anyio.lowlevel.checkpoint()
                        continue
                    with anyio.move_on_after(self._worker.idle_limit_s):
                        await self._submitted.get()
            except Exception as error:
                _log_failure(error)
                self._worker.abandon(error)

    def stop(self) -> None:
        self._scope.cancel()
        if self._worker.failure is None:
            self._worker.abandon(EngineClosedError("the engine was shut down"))


def _log_failure(error: BaseException) -> None:
    if isinstance(error, ExecutorLostError):
        log.error("the worker gives up: %s", error)
    else:
        log.exception("the worker's step loop failed")
