"""How much prompt a step may hold beside decoding rows, so that these get their next token in time."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ...errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...config import SchedulerConfig
    from .plan import StepPlan

PATIENCE = 4  # where there is no time for prompts, one step in so many takes a block of them all the same
SMOOTHING = 0.1  # weight of the newest step in the pace
PACES = (0.25, 4.0)  # one step says no more than that


class StepSeconds(Protocol):
    """Tells steps' times; `accel.step_cost.StepCost` is one."""

    def step_seconds(
        self,
        decode_contexts: NDArray[np.int64],
        chunk_starts: NDArray[np.int64],
        chunk_lengths: NDArray[np.int64],
        logit_rows: int,
        /,
    ) -> float:
        """Seconds of one step, from the tokens that each decoding row attends to [D] and the chunks [C]; so many of
        its tokens get logits."""
        ...


class ChunkBudget:
    """The largest number of prompt tokens, in whole blocks, with which a step stays within `slo_s` seconds.

    `pace` is how much longer steps take of late than was estimated: it follows what `observe` is told. Where not even
    one block fits, every PATIENCE-th step has one: prompts get on, if slowly.
    """

    def __init__(self, cost: StepSeconds, slo_s: float, block_size: int) -> None:
        self.pace = 1.0
        self._cost = cost
        self._slo_s = slo_s
        self._block_size = block_size
        self._denied = 0

    def mixed(
        self, contexts: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64], most: int
    ) -> int:
        """Tokens, at most `most`, for chunks in the same step as decoding rows with these contexts [D].

        The chunks [C] could begin at `starts` and have `lengths`; they are served in this order.
        """
        return self._largest(contexts, starts, lengths, most, self._slo_s)

    def alternating(
        self,
        contexts: NDArray[np.int64],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        most: int,
        decode_steps: float,
    ) -> int:
        """The same for a step of prompts only, for each of which there are `decode_steps` of the decoding rows: what
        those leave of their time is the prompts', so that the mean over a turn stays within the limit."""
        none = np.empty(0, np.int64)
        left = self._slo_s - self.pace * self._cost.step_seconds(contexts, none, none, len(contexts))
        return self._largest(none, starts, lengths, most, decode_steps * left)

    def _largest(
        self,
        contexts: NDArray[np.int64],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        most: int,
        limit_s: float,
    ) -> int:
        most = min(most, int(lengths.sum()))
        ends = np.array([*accumulate(lengths.tolist())])

        def fits(tokens: int) -> bool:
            count = int(np.searchsorted(ends, tokens)) + 1
            taken = lengths[:count].copy()
            left = ends[count - 1] - tokens
            taken[-1] -= left
            logit_rows = len(contexts) + count - bool(left)
            return self.pace * self._cost.step_seconds(contexts, starts[:count], taken, logit_rows) <= limit_s

        block = self._block_size
        low, high = 0, -(-most // block)  # in blocks: `low` fits, `high` does not, or is not known to
        if high and limit_s > 0 and fits(most):
            low = high
        while limit_s > 0 and high - low > 1:
            middle = (low + high) // 2
            if fits(middle * block):
                low = middle
            else:
                high = middle
        if low or not most:
            self._denied = 0
            return min(low * block, most)
        self._denied += 1
        if self._denied < PATIENCE:
            return 0
        self._denied = 0
        return min(block, most)

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step has taken so long."""
        lengths = np.array([len(chunk.tokens) for chunk in plan.chunks], np.int64)
        starts = np.array([chunk.start for chunk in plan.chunks], np.int64)
        estimate = self._cost.step_seconds(plan.decode_positions + 1, starts, lengths, len(plan.sample_slots))
        self.follow(seconds, estimate)

    def follow(self, seconds: float, estimate: float) -> None:
        """A step has taken so long, and was estimated to take as long."""
        if estimate > 0:
            ratio = min(max(seconds / estimate, PACES[0]), PACES[1])
            self.pace += SMOOTHING * (ratio - self.pace)


def make_chunk_budget(scheduler: SchedulerConfig, cost: StepSeconds | None, block_size: int) -> ChunkBudget | None:
    """What `scheduler.tpot_slo_ms` asks for; None where it asks for nothing.

    Raises:
        ConfigError: nothing tells what a step costs.
    """
    if scheduler.tpot_slo_ms is None:
        return None
    if cost is None:
        raise ConfigError("scheduler.tpot_slo_ms: nothing tells what a step of this engine costs: leave it out")
    return ChunkBudget(cost, scheduler.tpot_slo_ms / 1000, block_size)
