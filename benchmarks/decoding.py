"""Decoding steps of one executor, without requests around them."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.scheduler.plan import PromptChunk, StepPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..records import Sequence
    from ..runtime.worker.executor import Executor, StepHandle


def time_decoding(
    executor: Executor, sequence: Sequence, tables: NDArray[np.int32], block_size: int, steps: int, depth: int
) -> float:
    """Microseconds of a step in which rows that all are `sequence` decode, `depth` of them launched at once.

    `tables` [rows, blocks] are the rows' KV blocks, enough for the prompt and `steps` + 1 tokens.
    """
    prompt, batch = sequence.prompt_tokens, len(tables)
    slots, epochs, none = np.arange(batch), np.zeros(batch, np.int64), np.empty(0, np.int64)
    for slot in range(batch):
        executor.admit(slot, sequence, 0)
    chunks = [PromptChunk(slot, 0, 0, prompt, is_last=True) for slot in range(batch)]
    ends = len(prompt) * np.arange(1, batch + 1) - 1
    first = -(-len(prompt) // block_size)
    executor.launch(StepPlan(none, none, chunks, tables[:, :first], [], slots, ends, epochs, epochs)).result()
    launched: deque[StepHandle] = deque()
    start = time.perf_counter()
    for step in range(steps):
        positions = np.full(batch, len(prompt) + step)
        width = (len(prompt) + step) // block_size + 1
        plan = StepPlan(slots, positions, [], tables[:, :width], [], slots, slots, epochs + step + 1, epochs)
        launched.append(executor.launch(plan))
        if len(launched) == depth:
            launched.popleft().result()
    while launched:
        launched.popleft().result()
    return (time.perf_counter() - start) / steps * 1e6
