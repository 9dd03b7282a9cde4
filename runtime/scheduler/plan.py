"""What one step computes, in numpy: made without a device, launched by an executor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...records import Pooling

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from ...records import TokenLogprobs


@dataclass(slots=True)
class PromptChunk:
    """Tokens [start, start + length) of one row, computed in this step."""

    slot: int
    epoch: int  # of the slot, when this was planned
    start: int
    tokens: NDArray[np.int32]  # [length]
    is_last: bool  # what is known of the row is computed with it
    next_tokens: NDArray[np.int32] | None = None  # [length or length - 1]: set where prompt logprobs are asked for
    top_logprobs: int = 0
    pooling: Pooling | None = None  # asked for by the row, which then is not sampled

    @property
    def num_pooled(self) -> int:
        """Of how many tokens, the last ones, the hidden states are wanted."""
        if self.pooling is Pooling.MEAN:
            return len(self.tokens)
        return int(self.pooling is Pooling.LAST and self.is_last)


@dataclass(slots=True, eq=False)
class KVExport:
    """KV of the tokens [start, end) of a row: once this step has computed it, it goes to another worker's pool.

    Whoever takes the plan calls `done` exactly once, when nobody will read the source or write to the target any more.
    """

    slot: int
    epoch: int  # of the slot, when this was planned
    peer: int  # which of the pools that the executor is connected to
    start: int
    end: int
    source_blocks: NDArray[np.int32]  # [n], from the block on that holds `start`
    target_blocks: NDArray[np.int32]  # [n], of the peer's pool
    done: Callable[[], None]


@dataclass(slots=True)
class StepPlan:
    """One step. Rows are the decoding slots in order, then the chunks; tokens lie in the same order."""

    decode_slots: NDArray[np.int64]  # [D]
    decode_positions: NDArray[np.int64]  # [D]
    chunks: list[PromptChunk]
    block_tables: NDArray[np.int32]  # [D + C, B]
    copies: list[tuple[int, int]]  # (source, target) blocks, copied before anything else
    sample_slots: NDArray[np.int64]  # [R] slots that get a token
    sample_rows: NDArray[np.int64]  # [R] index of the token, among the step's T, whose logits are sampled
    sample_steps: NDArray[np.int64]  # [R] index of the output token
    sample_epochs: NDArray[np.int64]  # [R] the slots' epochs when this was planned
    exports: list[KVExport] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.decode_slots) + sum(len(chunk.tokens) for chunk in self.chunks)


@dataclass(slots=True)
class StepResult:
    """What a step produced, on the host. Logprob arrays are None where no row asked for them.

    `pooled` is the sum [hidden] of the hidden states that each chunk's pooling wants.
    """

    tokens: NDArray[np.int64]  # [R]
    logprobs: NDArray[np.float32] | None = None  # [R]
    top_ids: NDArray[np.int64] | None = None  # [R, k]
    top_logprobs: NDArray[np.float32] | None = None  # [R, k]
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # by chunk index
    pooled: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # by chunk index
    failed_exports: dict[int, str] = field(default_factory=dict)  # by export index: what went wrong
    conforming: list[int] = field(default_factory=list)  # of R: rows whose guide allows nothing after this token
    failed_rows: dict[int, str] = field(default_factory=dict)  # of R: rows that cannot go on, and why
