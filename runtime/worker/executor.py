"""What runs a plan: the boundary between the step loop (numpy, no device) and a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...kv_runtime.tiers.block_io import NoBytesIO

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ...kv_runtime.tiers import BlockIO
    from ...records import Sequence
    from ..scheduler.plan import StepPlan, StepResult


class StepHandle(Protocol):
    """A step that was launched."""

    def result(self) -> StepResult:
        """Wait for the step and return what it produced; raises what the device raised."""
        ...


class Executor(Protocol):
    """Owns the model, the KV pool and the sampling state of every slot."""

    @property
    def pool(self) -> Any:
        """What another executor's `connect` takes, so that it can write KV here."""
        ...

    def connect(self, peers: list[Any]) -> None:
        """The pools of the executors that prompts are handed over to: a plan's exports name one by its place."""
        ...

    def admit(self, slot: int, sequence: Sequence, choice: int) -> None:
        """Prepare a slot for a row that enters."""
        ...

    def readmit(self, slot: int, outputs: NDArray[np.int32]) -> None:
        """A preempted row's outputs [n] are all that is known of it on the device."""
        ...

    def release(self, slot: int) -> None:
        """The row is gone."""
        ...

    def ready(self) -> bool:
        """Whether it takes plans; False while what was lost is brought back, for which this must be asked.

        Raises:
            ExecutorLostError: it was lost. Nothing that was admitted or launched is known any more, every export of a
                plan that was launched is `done`.
        """
        ...

    def launch(self, plan: StepPlan) -> StepHandle:
        """Queue the step on the device and return without waiting for it, where the device allows.

        Where it raises, or the step's `result` does, the plan's rows are lost. Copies, and slots admitted, are not:
        other rows rely on them. Unless it raises itself each export is `done` in the end; the result waits for the
        exports, and tells which of them failed.

        Raises:
            ExecutorLostError: as `ready`; a step's `result` may raise it, too.
        """
        ...

    def close(self) -> None:
        """Wait for what was launched and end what the executor runs on."""
        ...


class PooledExecutor(Executor, Protocol):
    """An executor whose pool is within reach of this process, for tiers.

    `before_step` is called before each step writes to the pool, where the device's operations are queued.
    """

    before_step: Callable[[], None]

    @property
    def block_io(self) -> BlockIO:
        """Copies blocks of the pool out and in."""
        ...


class _NullHandle:
    __slots__ = ("_result",)

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class NullExecutor:
    """The null model: output token k is byte 97 + (prompt length + k) % 26, at once. It costs what the engine costs.

    The hidden state of token id t is the unit vector t % 16 of 16.
    """

    pool = None
    hidden_size = 16

    def __init__(self, num_slots: int) -> None:
        self.before_step: Callable[[], None] = lambda: None
        self.block_io = NoBytesIO()
        self._prompt_length = np.zeros(num_slots, np.int64)

    def connect(self, peers: list[Any]) -> None:
        """There is no KV to hand over."""

    def admit(self, slot: int, sequence: Sequence, choice: int) -> None:
        self._prompt_length[slot] = len(sequence.prompt_tokens)

    def readmit(self, slot: int, outputs: NDArray[np.int32]) -> None:
        """Nothing is kept on a device."""

    def release(self, slot: int) -> None:
        """Nothing is kept on a device."""

    def ready(self) -> bool:
        return True

    def launch(self, plan: StepPlan) -> StepHandle:
        from ..scheduler.plan import StepResult

        self.before_step()
        for export in plan.exports:
            export.done()
        tokens = 97 + (self._prompt_length[plan.sample_slots] + plan.sample_steps) % 26
        pooled = {
            index: self._add_hidden(chunk.tokens[-chunk.num_pooled :])
            for index, chunk in enumerate(plan.chunks)
            if chunk.num_pooled
        }
        return _NullHandle(StepResult(tokens, pooled=pooled))

    def _add_hidden(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        return np.bincount(tokens % self.hidden_size, minlength=self.hidden_size).astype(np.float32)

    def close(self) -> None:
        """Nothing runs."""
