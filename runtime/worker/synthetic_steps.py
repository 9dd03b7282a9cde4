"""Steps of any shape on an executor, without requests: what calibration and benchmarks run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...records import Request, SamplingParams, Sequence
from ..scheduler.plan import PromptChunk, StepPlan

if TYPE_CHECKING:
    from .executor import Executor


@dataclass(frozen=True, slots=True)
class StepShape:
    """`decode_contexts` are the tokens that each decoding row attends to, its new one included; `chunks` are (start,
    length) of prompts. Of the chunks the first `last_chunks` end their prompt: they give a token."""

    decode_contexts: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    last_chunks: int = 0

    @property
    def contexts(self) -> list[int]:
        """Tokens of each sequence at the end of the step: decoding rows, then chunks."""
        return [*self.decode_contexts, *(start + length for start, length in self.chunks)]

    @property
    def logit_rows(self) -> int:
        return len(self.decode_contexts) + self.last_chunks


class SyntheticSteps:
    """Plans for an executor that serves nobody: every slot decodes greedily, tokens are random, blocks scattered."""

    def __init__(self, executor: Executor, num_blocks: int, block_size: int, num_slots: int, vocab_size: int) -> None:
        self._num_slots = num_slots
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(0)
        self._blocks = self._rng.permutation(num_blocks).astype(np.int32)
        prompt = np.zeros(1, np.int32)
        for slot in range(num_slots):
            sampling = SamplingParams().with_defaults(temperature=0.0)
            executor.admit(slot, Sequence(Request(f"synthetic-{slot}"), prompt, sampling), 0)

    def fits(self, shape: StepShape) -> bool:
        """Whether there are slots and blocks for such a step."""
        contexts = shape.contexts
        blocks = sum(-(-context // self._block_size) for context in contexts)
        return len(contexts) <= self._num_slots and blocks <= len(self._blocks)

    def plan(self, shape: StepShape) -> StepPlan:
        """A step of that shape, which must fit."""
        contexts, decodes = shape.contexts, len(shape.decode_contexts)
        counts = [-(-context // self._block_size) for context in contexts]
        tables = np.zeros((len(contexts), max(counts)), np.int32)
        for row, (count, end) in enumerate(zip(counts, np.cumsum(counts).tolist(), strict=True)):
            tables[row, :count] = self._blocks[end - count : end]
        chunks = [
            PromptChunk(decodes + index, 0, start, self._tokens(length), index < shape.last_chunks)
            for index, (start, length) in enumerate(shape.chunks)
        ]
        sampled = np.arange(decodes + shape.last_chunks)
        ends = decodes + np.cumsum([length for _, length in shape.chunks[: shape.last_chunks]], dtype=np.int64)
        return StepPlan(
            decode_slots=np.arange(decodes),
            decode_positions=np.array(shape.decode_contexts, np.int64) - 1,
            chunks=chunks,
            block_tables=tables,
            copies=[],
            sample_slots=sampled,
            sample_rows=np.concatenate([np.arange(decodes), ends - 1]),
            sample_steps=np.zeros(len(sampled), np.int64),
            sample_epochs=np.zeros(len(sampled), np.int64),
        )

    def _tokens(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return self._rng.integers(0, self._vocab_size, count, np.int32)
