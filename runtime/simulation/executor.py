"""A device that computes nothing and takes as long as a cost model says."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...kv_runtime.tiers.block_io import NoBytesIO
from ..scheduler.plan import StepResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ...kv_runtime.tiers import BlockIO
    from ...records import Sequence
    from ..scheduler.plan import StepPlan


class Now(Protocol):
    """A clock; `VirtualTime` is one."""

    @property
    def now(self) -> float:
        """In seconds."""
        ...


class StepTimes(Protocol):
    """How long steps and transfers take; `accel.step_cost.StepCost` is one."""

    kv_bytes_per_token: int

    def step_seconds(
        self, decode_contexts: NDArray[np.int64], chunk_starts: list[int], chunk_lengths: list[int], logit_rows: int
    ) -> float:
        """Seconds of one step: decoding rows attend to `decode_contexts` [D] tokens, `logit_rows` tokens get logits."""
        ...

    def decode_seconds(self, rows: int, contexts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of steps that only decode as many rows; those of the n-th attend to `contexts[n]` tokens together. Equal to
        what `step_seconds` says of each."""
        ...

    def transfer_seconds(self, num_bytes: int, path: str) -> float:
        """Seconds that bytes take on a path: "handover" is from worker to worker, "ddr" and "nvme" between
        the device and a lower tier."""
        ...


class Latencies:
    """Times between two tokens of a row, in seconds, as they are read on the host; NaN where there is none before."""

    def __init__(self) -> None:
        self._seconds = np.empty(1024)
        self._count = 0

    def add(self, seconds: NDArray[np.float64]) -> None:
        end = self._count + len(seconds)
        if end > len(self._seconds):
            self._seconds = np.concatenate([self._seconds, np.empty(max(end, len(self._seconds)))])
        self._seconds[self._count : end] = seconds
        self._count = end

    @property
    def values(self) -> NDArray[np.float64]:
        known = self._seconds[: self._count]
        return known[~np.isnan(known)]


class _SimulatedStep:
    """A launched step; nobody may ask for its result before the virtual time `end`."""

    __slots__ = ("_executor", "end", "plan")

    def __init__(self, executor: SimulatedExecutor, plan: StepPlan, end: float) -> None:
        self._executor = executor
        self.plan = plan
        self.end = end

    def result(self) -> StepResult:
        return self._executor.finish()


class SimulatedExecutor:
    """Steps run one after the other, each as long as `times` says. A row's output is one token id again and again,
    which `output_token` chooses for its sequence.

    KV leaves for other workers over one link, layer by layer while later layers and later steps compute; a step's
    result waits for it.
    """

    pool = None

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        times: StepTimes,
        time: Now,
        output_token: Callable[[Sequence], int],
    ) -> None:
        self.busy_s = 0.0
        self.free_at = 0.0  # when what was launched so far has run
        self.block_io: BlockIO = NoBytesIO()
        self.before_step: Callable[[], None] = lambda: None
        self.latencies = Latencies()
        self._times = times
        self._time = time
        self._output_token = output_token
        self._unread: deque[_SimulatedStep] = deque()
        self._num_layers = num_layers
        self._link_free_at = 0.0
        self.tokens = np.zeros(num_slots, np.int64)
        self._token_at = np.full(num_slots, np.nan)  # when the row's newest token was read

    def connect(self, peers: list[Any]) -> None:
        """Bytes take as long to any of them."""

    def admit(self, slot: int, sequence: Sequence, choice: int) -> None:
        self.tokens[slot] = self._output_token(sequence)
        first = sequence.timings.first_token  # of one that was handed over
        self._token_at[slot] = np.nan if first is None else first

    def readmit(self, slot: int, outputs: NDArray[np.int32]) -> None:
        """Nothing is kept on a device."""

    def release(self, slot: int) -> None:
        """Nothing is kept on a device."""

    def ready(self) -> bool:
        return True

    def launch(self, plan: StepPlan) -> _SimulatedStep:
        self.before_step()
        starts = [chunk.start for chunk in plan.chunks]
        lengths = [len(chunk.tokens) for chunk in plan.chunks]
        seconds = self._times.step_seconds(plan.decode_positions + 1, starts, lengths, len(plan.sample_slots))
        begin = max(self._time.now, self.free_at)
        end = self.free_at = begin + seconds
        self.busy_s += seconds
        if plan.exports:
            end = self._send(plan, begin, seconds)
        step = _SimulatedStep(self, plan, end)
        self._unread.append(step)
        return step

    def _send(self, plan: StepPlan, begin: float, seconds: float) -> float:
        """When the last layer's KV has left, if each goes once it is computed and the one before has left."""
        layers = self._num_layers
        num_bytes = sum(export.end - export.start for export in plan.exports) * self._times.kv_bytes_per_token
        layer_s = self._times.transfer_seconds(num_bytes // layers, "handover")
        first = max(begin + seconds / layers, self._link_free_at)
        self._link_free_at = max(first + layers * layer_s, begin + seconds + layer_s)
        return self._link_free_at

    # -- steps that are alike: see `repetition.py` -------------------------------------------------------------------

    def foresee(self, rows: int, computed: int, steps: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds of the unread steps and of `steps` more that decode as many rows, and when each of them ends.

        `computed` tokens is what the rows have in all before the first of those that are not launched.
        """
        unread = len(self._unread)
        seconds = self._times.decode_seconds(rows, computed + rows * np.arange(1 - unread, steps + 1))
        ends = np.cumsum(np.concatenate([[self.free_at], seconds[unread:]]))[1:]
        return seconds, np.concatenate([[step.end for step in self._unread], ends])

    def advance(
        self, slots: NDArray[np.int64], seconds: NDArray[np.float64], ends: NDArray[np.float64], steps: int
    ) -> None:
        """Have so many steps been launched, with what `foresee` said, and as many been read."""
        unread = len(self._unread)
        for step, end in zip(self._unread, ends[steps:].tolist(), strict=False):
            step.end = end
        self.free_at = self._unread[-1].end
        self.busy_s = float(np.cumsum(np.concatenate([[self.busy_s], seconds[unread : unread + steps]]))[-1])
        self.latencies.add(ends[0] - self._token_at[slots])
        self.latencies.add(np.repeat(np.diff(ends[:steps]), len(slots)))
        self._token_at[slots] = ends[steps - 1]

    # ----------------------------------------------------------------------------------------------------------------

    @property
    def oldest_end(self) -> float:
        """When the oldest step that is unread will have run."""
        return self._unread[0].end

    def finish(self) -> StepResult:
        """The result of the oldest step."""
        step = self._unread.popleft()
        assert step.end <= self._time.now, "a step was read before it had run"
        for export in step.plan.exports:
            export.done()
        slots = step.plan.sample_slots
        since = self._time.now - self._token_at[slots]
        self._token_at[slots] = self._time.now
        self.latencies.add(since)
        return StepResult(self.tokens[slots])

    def close(self) -> None:
        """Nothing runs."""
