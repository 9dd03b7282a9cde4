"""The resident table: every row (one choice of one sequence) that holds a slot, as columns of numpy arrays.

Only the worker's thread touches it. A row's tokens are its prompt followed by its outputs; `computed` counts those
whose KV has been launched, `launched` the outputs that were launched (the newest of them may not be read yet) and
`outputs_read` those whose token id is known on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...records import Choice, Sequence
    from .lease import Lease


class RowState(IntEnum):
    """What the next plan may do with a row."""

    FREE = 0
    PREFILL = 1  # tokens below `target` are to be computed
    FORKING = 2  # a further choice, waiting for the first one's prompt
    HELD = 3  # prompt computed, not yet handed to decode
    DECODE = 4
    PREEMPTED = 5  # lost its blocks; keeps its slot, its outputs and its place


@dataclass(slots=True, eq=False)
class ResidentSequence:
    """A sequence on the worker: its lease and the slots of its choices."""

    sequence: Sequence
    lease: Lease
    slots: list[int]
    decoding: bool = False  # handed to decode (else it still belongs to prefill)
    posted: bool = False  # given back by prefill, on its way to decode
    pooled: NDArray[np.float32] | None = None  # [hidden], where it asks for pooling: the sum of hidden states so far
    losses: int = 0  # of the executor while it computed
    lost_at: tuple[int, int] = (0, 0)  # the positions from where to where


@dataclass(slots=True, eq=False)
class Row:
    """One choice."""

    owner: ResidentSequence
    choice: Choice


class ResidentTable:
    """Columns over slots [S]; block tables [S, B] and outputs [S, max_seq_len]."""

    def __init__(self, num_slots: int, max_seq_len: int, block_size: int) -> None:
        self.block_size = block_size
        self.max_blocks = -(-max_seq_len // block_size)
        self.rows: list[Row | None] = [None] * num_slots
        self.tenants = [""] * num_slots  # of the rows; a free slot's is its last one's
        self.state = np.zeros(num_slots, np.int8)
        self.epoch = np.zeros(num_slots, np.int64)  # grows when a slot is freed: stale results are recognised
        self.order = np.zeros(num_slots, np.int64)  # admission order; smaller is older
        self.prompt_len = np.zeros(num_slots, np.int64)
        self.computed = np.zeros(num_slots, np.int64)
        self.target = np.zeros(num_slots, np.int64)
        self.launched = np.zeros(num_slots, np.int64)
        self.outputs_read = np.zeros(num_slots, np.int64)
        self.max_outputs = np.zeros(num_slots, np.int64)
        self.watched = np.zeros(num_slots, bool)  # needs a look at each token: streaming, stop strings, logprobs
        self.timeout = np.full(num_slots, np.inf)  # in monotonic seconds
        self.first_time = np.zeros(num_slots)
        self.last_time = np.zeros(num_slots)
        self.stop_ids = np.full((num_slots, 1), -1, np.int64)
        self.blocks = np.zeros((num_slots, self.max_blocks), np.int32)
        self.num_blocks = np.zeros(num_slots, np.int64)
        self.outputs = np.zeros((num_slots, max_seq_len), np.int32)
        self._next_order = 0

    def occupy(self, slot: int, row: Row, state: RowState, timeout: float) -> None:
        """Write a new row into a free slot."""
        sequence = row.owner.sequence
        length = len(sequence.prompt_tokens)
        self.rows[slot] = row
        self.tenants[slot] = sequence.request.tenant
        self.state[slot] = state
        self.order[slot] = self._next_order
        self._next_order += 1
        self.prompt_len[slot] = self.target[slot] = length
        self.max_outputs[slot] = sequence.sampling.max_new_tokens
        self.timeout[slot] = timeout
        if sequence.eos_token_ids or sequence.sampling.stop_token_ids:
            self._write_stop_ids(slot, (*sequence.eos_token_ids, *sequence.sampling.stop_token_ids))

    def _write_stop_ids(self, slot: int, ids: tuple[int, ...]) -> None:
        width = self.stop_ids.shape[1]
        if len(ids) > width:
            extra = np.full((len(self.rows), len(ids) - width), -1, np.int64)
            self.stop_ids = np.concatenate([self.stop_ids, extra], axis=1)
        self.stop_ids[slot, : len(ids)] = ids

    def vacate(self, slots: list[int]) -> None:
        """Forget rows; results still in flight for them become stale."""
        for slot in slots:
            self.rows[slot] = None
        at = np.array(slots, np.int64)
        self.state[at] = RowState.FREE
        self.epoch[at] += 1
        self.computed[at] = self.launched[at] = self.outputs_read[at] = self.num_blocks[at] = 0
        self.stop_ids[at] = -1
        self.watched[at] = False
        self.timeout[at] = np.inf

    def set_blocks(self, slot: int, blocks: NDArray[np.int32]) -> None:
        """Replace a row's block table."""
        self.blocks[slot, : len(blocks)] = blocks
        self.num_blocks[slot] = len(blocks)

    def row_blocks(self, slot: int) -> NDArray[np.int32]:
        """A copy of a row's block ids."""
        return self.blocks[slot, : self.num_blocks[slot]].copy()

    def all_blocks(self, slots: list[int]) -> NDArray[np.int32]:
        """The block ids of several rows, as one array."""
        counts = self.num_blocks[slots]
        width = int(counts.max())
        return self.blocks[slots, :width][np.arange(width) < counts[:, None]]

    def tokens(self, slot: int, count: int) -> NDArray[np.int32]:
        """The first `count` tokens of a row: prompt, then outputs read."""
        row = self.rows[slot]
        assert row is not None
        prompt = row.owner.sequence.prompt_tokens
        if count <= len(prompt):
            return prompt[:count]
        return np.concatenate([prompt, self.outputs[slot, : count - len(prompt)]])

    def is_in(self, state: RowState, slots: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.bool_]:
        """Which of the slots, in order, are in a state."""
        found: NDArray[np.bool_] = self.state[slots] == int(state)  # numpy takes an enum's member the long way round
        return found

    def has(self, state: RowState) -> bool:
        """Whether any row is in a state."""
        return int(state).to_bytes() in self.state.tobytes()

    def slots_in(self, *states: RowState) -> NDArray[np.int64]:
        """Slots in any of the states, oldest first."""
        wanted = [int(state) for state in states]
        found = np.flatnonzero(np.isin(self.state, wanted) if len(wanted) > 1 else self.state == wanted[0])
        return found[np.argsort(self.order[found], kind="stable")]

    def decoding(self) -> NDArray[np.int64]:
        """Slots that are to get a token, and have not all of theirs launched."""
        return np.flatnonzero(self.is_in(RowState.DECODE) & (self.launched < self.max_outputs))
