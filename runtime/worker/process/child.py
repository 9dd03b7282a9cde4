"""The worker's process: builds the executor that the configuration asks for and runs the plans that come."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, NoReturn

from ....config import SageLLMConfig, SchedulerMode
from ....records import Request, Sequence
from ...executors import make_lone_executor
from ...garbage import collect_rarely
from ...scheduler.plan import KVExport
from .channel import Channel
from .messages import Admission, Close, Connect, Failure, Readmission, Ready

if TYPE_CHECKING:
    from ...scheduler.plan import StepPlan
    from ..executor import Executor, StepHandle
    from .messages import Export, Release

_PR_SET_PDEATHSIG = 1


def main(channel: int, notices: int, parent: int) -> None:
    """Serve the worker at the other end of two sockets, until it says `Close` or is gone."""
    _die_with(parent)
    try:
        _serve(*(Channel(socket.socket(fileno=descriptor)) for descriptor in (channel, notices)))
    except (EOFError, OSError):  # nobody is left to serve
        _exit(1)


def _die_with(parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's business: it finishes what it has, then tells us
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        _exit(1)


def _serve(channel: Channel, notices: Channel) -> None:
    (config, worker), _ = channel.receive()
    try:
        executor, ready, descriptors = _build(SageLLMConfig(**config), worker)
    except Exception as error:
        channel.send(Failure(error))
        return
    collect_rarely()
    channel.send(ready, descriptors=descriptors)
    connections, exporting = _Connections(executor), _Exporting(notices)
    steps: SimpleQueue[StepHandle | Failure] = SimpleQueue()
    Thread(target=_answer, args=(channel, steps), daemon=True).start()
    while True:
        message, opened = channel.receive()
        if isinstance(message, Close):
            executor.close()
            _exit(0)
        if isinstance(message, Connect):
            connections.connect(message, opened)
            continue
        for change in message.changes:
            _apply(executor, change)
        message.plan.exports = [exporting.begin(export) for export in message.exports]
        steps.put(_launch(executor, message.plan))


def _build(config: SageLLMConfig, worker: int) -> tuple[Executor, Ready, tuple[int, ...]]:
    """The executor, how others map its pool, and the open files that they need for it."""
    scheduler = config.scheduler
    receives = scheduler.mode is SchedulerMode.STRICT and worker >= scheduler.prefill_workers
    if not receives and not config.kv_cache.enable_tiering:
        executor, backend_name = make_lone_executor(config, worker)
        return executor, Ready(backend_name, None), ()
    from .shared_pool import PoolSharing

    sharing = PoolSharing()
    executor, backend_name = make_lone_executor(config, worker, sharing.allocate)
    if executor.pool is None:
        return executor, Ready(backend_name, None), ()
    pool, descriptors = sharing.describe(executor.pool)
    return executor, Ready(backend_name, pool), descriptors


class _Connections:
    """The pools that KV is handed over to."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._peers: list[Any] = []

    def connect(self, message: Connect, opened: list[int]) -> None:
        self._peers += [None] * (message.peer + 1 - len(self._peers))
        if message.pool is not None:
            from .shared_pool import open_pool

            self._peers[message.peer] = open_pool(message.pool, opened)
        for descriptor in opened:
            os.close(descriptor)
        self._executor.connect(self._peers)


class _Exporting:
    """Tells the worker of each export that is done, from whatever thread."""

    def __init__(self, notices: Channel) -> None:
        self._notices = notices
        self._lock = Lock()

    def begin(self, export: Export) -> KVExport:
        done = partial(self._tell, export.number)
        return KVExport(0, 0, export.peer, export.start, export.end, export.source_blocks, export.target_blocks, done)

    def _tell(self, number: int) -> None:
        with self._lock, suppress(OSError):  # the parent is gone, and so are we in a moment
            self._notices.send(number)


def _apply(executor: Executor, change: Admission | Readmission | Release) -> None:
    if isinstance(change, Admission):
        request = Request(f"slot-{change.slot}")
        sequence = Sequence(request, change.prompt_tokens, change.sampling, change.eos_token_ids, change.guide)
        executor.admit(change.slot, sequence, change.choice)
    elif isinstance(change, Readmission):
        executor.readmit(*change)
    else:
        executor.release(change.slot)


def _launch(executor: Executor, plan: StepPlan) -> StepHandle | Failure:
    try:
        return executor.launch(plan)
    except Exception as error:
        for export in plan.exports:
            export.done()
        return Failure(error)


def _answer(channel: Channel, steps: SimpleQueue[StepHandle | Failure]) -> None:
    while True:
        step = steps.get()
        try:
            answer = step if isinstance(step, Failure) else step.result()
        except Exception as error:
            answer = Failure(error)
        try:
            channel.send(answer)
        except OSError:
            _exit(1)


def _exit(code: int) -> NoReturn:
    """At once, whatever other threads compute."""
    os._exit(code)
