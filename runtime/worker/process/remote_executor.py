"""The worker's side of a worker process: an executor whose model, KV tensor and sampling state live elsewhere."""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from dataclasses import replace
from functools import cached_property, partial
from itertools import count
from threading import Condition
from typing import TYPE_CHECKING, Any, NoReturn

from ....errors import ExecutorLostError
from .child_process import ChildProcess
from .messages import Admission, Close, Connect, Export, Failure, Readmission, Ready, Release, Step
from .remote_block_io import RemoteBlockIO

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from ....config import SageLLMConfig
    from ....records import Sequence
    from ...scheduler.plan import KVExport, StepPlan, StepResult
    from .messages import PoolDescription

_STEP_LIMIT_S = 120.0
_START_LIMIT_S = 1800.0  # loading the weights included
_CHILD = f"{__package__}.child"


class MappablePool:
    """The KV pool of one process, and the open files with which others map it."""

    def __init__(self, description: PoolDescription | None, descriptors: list[int]) -> None:
        self.description = description
        self.descriptors = tuple(descriptors)
        for descriptor in descriptors:
            weakref.finalize(self, os.close, descriptor)


class RemotePool:
    """A worker's pool as its peers know it: another one whenever its process is; None while there is no process.

    It is None before the worker knows of the loss: KV that is sent for a lease granted after it is not sent to the
    pool of before.
    """

    def __init__(self) -> None:
        self.current: MappablePool | None = None


class _RemoteStep:
    """A step that was sent; answers come in the order of the steps."""

    __slots__ = ("_executor", "_refused", "_sent", "answer")

    def __init__(self, executor: RemoteExecutor, sent: list[int], refused: dict[int, str]) -> None:
        self._executor = executor
        self._sent, self._refused = sent, refused  # exports, by index
        self.answer: StepResult | Failure | None = None

    def result(self) -> StepResult:
        while self.answer is None:
            self._executor.receive_answer()
        if isinstance(self.answer, Failure):
            raise self.answer.error
        result = self.answer
        failed = {self._sent[index]: why for index, why in result.failed_exports.items()}
        return replace(result, failed_exports=failed | self._refused) if self._refused or failed else result


def _finish_export(exporting: dict[int, Callable[[], None]], number: int) -> None:
    if (done := exporting.pop(number, None)) is not None:
        done()


def _tell(executor: weakref.ref[RemoteExecutor]) -> None:
    if (alive := executor()) is not None:
        alive.on_exit()


class RemoteExecutor:
    """Sends admissions and plans to a process that runs them, and starts another one when it is lost.

    All methods but `block_io`'s belong to one thread. A step may take `scheduler.step_timeout_s` from when its result
    is asked for; after that the process counts as hanging and is killed. `on_exit` is called on another thread when
    the process has ended: ask `ready` then.
    """

    def __init__(self, config: SageLLMConfig, worker: int = 0) -> None:
        timeout = config.scheduler.step_timeout_s
        self.on_exit: Callable[[], None] = lambda: None
        self.before_step: Callable[[], None] = lambda: None
        self.backend_name = ""
        self._task = config.to_dict(), worker
        self._worker = worker
        self._timeout = (_STEP_LIMIT_S if timeout is None else timeout) or None
        self._changes: list[Admission | Readmission | Release] = []
        self._unanswered: deque[_RemoteStep] = deque()
        self._exporting: dict[int, Callable[[], None]] = {}  # what to call when they are done, by number
        self._numbers = count()
        self._peers: list[RemotePool] = []
        self._connected: list[MappablePool | None] = []  # what the process has mapped of each
        self.pool = RemotePool()
        self._granularity = config.kv_cache.granularity
        self._steps = Condition()  # around the two numbers
        self._launched = self._over = 0
        self._child: ChildProcess | None = None
        self._end_child: Callable[[], Any] = lambda: None
        self._is_ready = False
        self._start()

    def _start(self) -> None:
        on_notice, on_exit = partial(_finish_export, self._exporting), partial(_tell, weakref.ref(self))
        self._child = ChildProcess(_CHILD, on_notice, on_exit)
        self._connected = [None] * len(self._peers)
        self._end_child = weakref.finalize(self, self._child.kill)
        self._give_up_at = time.monotonic() + _START_LIMIT_S
        try:
            self._child.channel.send(self._task, _START_LIMIT_S)
        except OSError:
            self._lose(self._child.describe_end())

    def wait_until_ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            ModelError, ConfigError: as loading it here would.
            ExecutorLostError: the process has ended, or takes too long.
        """
        try:
            while not self._is_ready:
                self._receive_ready(_START_LIMIT_S)
        except BaseException:
            self.close()
            raise

    def ready(self) -> bool:
        child = self._child
        if child is None:
            try:
                self._start()
            except OSError as error:
                self._lose(f"no other one can be started: {error}")
        elif self._is_ready:
            if child.has_ended:
                self._lose(child.describe_end())
        elif child.channel.has_message():
            try:
                self._receive_ready(_START_LIMIT_S)
            except ExecutorLostError:
                raise
            except Exception as error:
                self._lose(f"a new process cannot load the model: {type(error).__name__}: {error}")
        elif time.monotonic() > self._give_up_at:
            self._lose(f"process {child.pid} was not ready in {_START_LIMIT_S:g} s")
        return self._is_ready

    def _receive_ready(self, timeout: float) -> None:
        message, descriptors = self._receive(timeout)
        if isinstance(message, Failure):
            raise message.error
        assert isinstance(message, Ready)
        self.backend_name = message.backend_name
        self.pool.current = MappablePool(message.pool, descriptors)
        self._is_ready = True

    @cached_property
    def block_io(self) -> RemoteBlockIO:
        """Copies blocks of the process's pool out and in; for once it is ready."""
        return RemoteBlockIO(self.pool, self._granularity, self._wait_for_launched)

    def _wait_for_launched(self) -> None:
        with self._steps:
            launched = self._launched
            self._steps.wait_for(lambda: self._over >= launched)

    def _count_over(self, over: int) -> None:
        with self._steps:
            self._over = over
            self._steps.notify_all()

    def connect(self, peers: list[RemotePool]) -> None:
        self._peers = peers
        self._connected = [None] * len(peers)

    def admit(self, slot: int, sequence: Sequence, choice: int) -> None:
        prompt, sampling, eos = sequence.prompt_tokens, sequence.sampling, sequence.eos_token_ids
        self._changes.append(Admission(slot, prompt, sampling, eos, sequence.guide, choice))

    def readmit(self, slot: int, outputs: NDArray[np.int32]) -> None:
        self._changes.append(Readmission(slot, outputs.copy()))

    def release(self, slot: int) -> None:
        self._changes.append(Release(slot))

    def launch(self, plan: StepPlan) -> _RemoteStep:
        child = self._child
        if child is None or not self._is_ready:
            raise ExecutorLostError("the worker's process is not ready")
        self.before_step()
        sent = [index for index, export in enumerate(plan.exports) if self._connect(child, export.peer)]
        exports = [self._number(plan.exports[index]) for index in sent]
        try:
            child.channel.send(
                Step(self._changes, replace(plan, exports=[]) if plan.exports else plan, exports), self._timeout
            )
        except Exception as error:
            for export in exports:  # the caller's again
                self._exporting.pop(export.number, None)
            self._lose_unsent(child, error)
        refused = dict.fromkeys(
            {*range(len(plan.exports))} - {*sent}, "the process of the other worker is being started"
        )
        for index in refused:
            plan.exports[index].done()
        self._changes = []
        step = _RemoteStep(self, sent, refused)
        self._unanswered.append(step)
        with self._steps:
            self._launched += 1
        return step

    def _connect(self, child: ChildProcess, peer: int) -> bool:
        """Have the process map a peer's pool; False if there is none now."""
        pool = self._peers[peer].current
        if pool is None:
            return False
        if pool is not self._connected[peer]:
            try:
                child.channel.send(Connect(peer, pool.description), self._timeout, pool.descriptors)
            except OSError as error:
                self._lose_unsent(child, error)
            self._connected[peer] = pool
        return True

    def _number(self, export: KVExport) -> Export:
        number = next(self._numbers)
        self._exporting[number] = export.done
        return Export(number, export.peer, export.start, export.end, export.source_blocks, export.target_blocks)

    def _lose_unsent(self, child: ChildProcess, error: Exception) -> NoReturn:
        if isinstance(error, TimeoutError):
            self._lose(f"process {child.pid} took no step in {self._timeout:g} s")
        if isinstance(error, OSError):
            self._lose(child.describe_end())
        raise error

    def receive_answer(self) -> None:
        """Wait for the answer to the oldest step that has none."""
        if not self._unanswered:
            raise ExecutorLostError("the worker's process, and this step with it, was lost")
        answer, _ = self._receive(self._timeout)
        self._unanswered.popleft().answer = answer
        self._count_over(self._over + 1)

    def _receive(self, timeout: float | None) -> tuple[Any, list[int]]:
        child = self._child
        assert child is not None
        try:
            return child.channel.receive(timeout)
        except TimeoutError:
            self._lose(f"process {child.pid} took more than {timeout:g} s for a step")
        except (EOFError, OSError):
            self._lose(child.describe_end())

    def _lose(self, why: str) -> NoReturn:
        self._end()
        self._changes.clear()
        self._unanswered.clear()
        raise ExecutorLostError(f"the process of worker {self._worker} was lost: {why}")

    def close(self) -> None:
        if self._child is None:
            return
        if self._is_ready:
            try:
                self._child.channel.send(Close(), 1.0)
                self._child.end()
            except OSError:
                pass
        self._end()

    def _end(self) -> None:
        self.pool.current = None
        self._end_child()
        self._child = None
        self._is_ready = False
        self._count_over(self._launched)
        while self._exporting:  # nobody copies any more
            self._exporting.popitem()[1]()
