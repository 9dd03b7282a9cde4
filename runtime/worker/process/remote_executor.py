"""The worker's side of a worker process: an executor whose model, KV tensor and sampling state live elsewhere."""

from __future__ import annotations

import time
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from ....errors import ExecutorLostError
from .child_process import ChildProcess
from .messages import Admission, Close, Failure, Readmission, Ready, Release, Step

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from ....config import SageLLMConfig
    from ....records import Sequence
    from ...scheduler.plan import StepPlan, StepResult

_STEP_LIMIT_S = 120.0
_START_LIMIT_S = 1800.0  # loading the weights included
_CHILD = f"{__package__}.child"


class _RemoteStep:
    """A step that was sent; answers come in the order of the steps."""

    __slots__ = ("_executor", "answer")

    def __init__(self, executor: RemoteExecutor) -> None:
        self._executor = executor
        self.answer: StepResult | Failure | None = None

    def result(self) -> StepResult:
        while self.answer is None:
            self._executor.receive_answer()
        if isinstance(self.answer, Failure):
            raise self.answer.error
        return self.answer


def _tell(executor: weakref.ref[RemoteExecutor]) -> None:
    if (alive := executor()) is not None:
        alive.on_exit()


class RemoteExecutor:
    """Sends admissions and plans to a process that runs them, and starts another one when it is lost.

    All methods belong to one thread. A step may take `scheduler.step_timeout_s` from when its result is asked for;
    after that the process counts as hanging and is killed. `on_exit` is called on another thread when the process
    has ended: ask `ready` then.
    """

    def __init__(self, config: SageLLMConfig, worker: int = 0) -> None:
        timeout = config.scheduler.step_timeout_s
        self.on_exit: Callable[[], None] = lambda: None
        self.backend_name = ""
        self._task = config.to_dict(), worker
        self._timeout = (_STEP_LIMIT_S if timeout is None else timeout) or None
        self._changes: list[Admission | Readmission | Release] = []
        self._unanswered: deque[_RemoteStep] = deque()
        self._child: ChildProcess | None = None
        self._is_ready = False
        self._start()

    def _start(self) -> None:
        self._child = ChildProcess(_CHILD, partial(_tell, weakref.ref(self)))
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
            self._start()
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
        message = self._receive(timeout)
        if isinstance(message, Failure):
            raise message.error
        assert isinstance(message, Ready)
        self.backend_name = message.backend_name
        self._is_ready = True

    @property
    def pool(self) -> Any:
        return None

    def connect(self, peers: list[Any]) -> None:
        """The configuration refuses workers that hand KV over."""

    def admit(self, slot: int, sequence: Sequence, choice: int) -> None:
        self._changes.append(Admission(slot, sequence.prompt_tokens, sequence.sampling, sequence.eos_token_ids, choice))

    def readmit(self, slot: int, outputs: NDArray[np.int32]) -> None:
        self._changes.append(Readmission(slot, outputs.copy()))

    def release(self, slot: int) -> None:
        self._changes.append(Release(slot))

    def launch(self, plan: StepPlan) -> _RemoteStep:
        child = self._child
        if child is None or not self._is_ready:
            raise ExecutorLostError("the worker's process is not ready")
        try:
            child.channel.send(Step(self._changes, plan), self._timeout)
        except TimeoutError:
            self._lose(f"process {child.pid} took no step in {self._timeout:g} s")
        except OSError:
            self._lose(child.describe_end())
        self._changes = []
        step = _RemoteStep(self)
        self._unanswered.append(step)
        return step

    def receive_answer(self) -> None:
        """Wait for the answer to the oldest step that has none."""
        if not self._unanswered:
            raise ExecutorLostError("the worker's process, and this step with it, was lost")
        answer = self._receive(self._timeout)
        self._unanswered.popleft().answer = answer

    def _receive(self, timeout: float | None) -> Any:
        child = self._child
        assert child is not None
        try:
            return child.channel.receive(timeout)[0]
        except TimeoutError:
            self._lose(f"process {child.pid} took more than {timeout:g} s for a step")
        except (EOFError, OSError):
            self._lose(child.describe_end())

    def _lose(self, why: str) -> Any:
        self._end_child()
        self._child = None
        self._is_ready = False
        self._changes.clear()
        self._unanswered.clear()
        raise ExecutorLostError(f"the worker's process was lost: {why}")

    def close(self) -> None:
        if self._child is None:
            return
        if self._is_ready:
            try:
                self._child.channel.send(Close(), 1.0)
                self._child.end()
            except OSError:
                pass
        self._end_child()
        self._child = None
