"""A model that reads its KV, so that a block which holds the wrong one shows in the tokens."""

from __future__ import annotations

import numpy as np
import pytest

from sageLLM.runtime.scheduler.plan import StepResult


class ReadingExecutor:
    """A model whose next token depends on every token of its context, read from the blocks that the plan names.

    Stands for a device: lost, it knows nothing, so that KV which is not computed again shows in the tokens.
    """

    def __init__(self, num_blocks, block_size):
        self.kv = self.pool = np.zeros((num_blocks, block_size), np.int64)
        self.newest = {}
        self.rows = {}

    def forget(self):
        self.kv[:] = 1_000_003
        self.newest.clear()
        self.rows.clear()

    def connect(self, peers):
        self.peers = peers

    def admit(self, slot, sequence, choice):
        self.rows[slot] = sequence

    def readmit(self, slot, outputs):
        assert slot in self.rows
        if len(outputs):
            self.newest[slot] = int(outputs[-1])

    def release(self, slot):
        self.rows.pop(slot, None)

    def ready(self):
        return True

    def launch(self, plan):
        size = self.kv.shape[1]
        for source, target in plan.copies:
            self.kv[target] = self.kv[source]
        ends = []
        rows = [(int(p), [self.newest[s]]) for s, p in zip(plan.decode_slots, plan.decode_positions, strict=True)]
        rows += [(chunk.start, chunk.tokens.tolist()) for chunk in plan.chunks]
        for table, (start, tokens) in zip(plan.block_tables, rows, strict=True):
            for position, token in enumerate(tokens, start):
                self.kv[table[position // size], position % size] = token
                context = self.kv[table[: position // size + 1]].reshape(-1)[: position + 1]
                ends.append(next_token(context))
        tokens = np.array([ends[row] for row in plan.sample_rows], np.int64)
        assert set(plan.sample_slots.tolist()) <= self.rows.keys()
        self.newest.update(zip(plan.sample_slots.tolist(), tokens.tolist(), strict=True))
        return Handle(StepResult(tokens, failed_exports=self.export(plan)))

    def export(self, plan):
        """Send what the plan exports; which of it failed."""
        for export in plan.exports:
            self.send(export)
        return {}

    def send(self, export):
        size = self.kv.shape[1]
        for position in range(export.start, export.end):
            at, offset = position // size - export.start // size, position % size
            value = self.kv[export.source_blocks[at], offset]
            self.peers[export.peer][export.target_blocks[at], offset] = value
        export.done()

    def close(self):
        """Nothing runs."""


class Handle:
    def __init__(self, result):
        self.kept = result

    def result(self):
        return self.kept


def next_token(context):
    return int(np.dot(context, np.arange(1, len(context) + 1)) % 251)


def expected_tokens(prompt, count):
    tokens = [*prompt]
    for _ in range(count):
        tokens.append(next_token(np.array(tokens)))
    return tokens[len(prompt) :]


@pytest.fixture(scope="session")
def reading_executor():
    """`reading_executor(num_blocks, block_size)`: see ReadingExecutor."""
    return ReadingExecutor


@pytest.fixture(scope="session", name="expected_tokens")
def expected_tokens_fixture():
    """`expected_tokens(prompt, count)`: what it says."""
    return expected_tokens
