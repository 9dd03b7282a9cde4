"""A pool in which every whole block says whose KV it holds, so that a wrong one shows."""

from __future__ import annotations

import time
from collections import deque
from hashlib import sha256

import numpy as np
import pytest

from sageLLM.kv_runtime import KVCache
from sageLLM.kv_runtime.tiers import FileTier, KVTiers

ANYONE = ("", "")
BLOCK_BYTES = 32


class PoolIO:
    """Blocks of 32 bytes; `fail` names the method that raises next."""

    block_bytes = BLOCK_BYTES
    layout = "test"

    def __init__(self, num_blocks):
        self.pool = np.zeros((num_blocks, BLOCK_BYTES), np.uint8)
        self.fail = None

    def allocate(self, count):
        return np.zeros((count, BLOCK_BYTES), np.uint8)

    def _stumble(self, method):
        if self.fail == method:
            self.fail = None
            raise RuntimeError("the test says so")

    def read(self, blocks, buffer, rows):
        self._stumble("read")
        buffer[rows] = self.pool[blocks]

    def write(self, blocks, buffer, rows):
        self._stumble("write")
        self.pool[blocks] = buffer[rows]

    def synchronize(self):
        pass

    def fence(self):
        self._stumble("fence")


class Bed:
    """A cache with tiers. Jobs of the copier wait in `jobs` until `work` does them, or have a thread of their own."""

    def __init__(self, blocks=8, block_size=4, host_blocks=16, files=None, thread=False, cost=None, **options):
        self.size = block_size
        self.kv = KVCache(blocks, block_size)
        self.io = PoolIO(blocks)
        self.jobs = deque()
        self.now = 0.0
        if files is not None:
            files = FileTier(*files, block_size, BLOCK_BYTES) if isinstance(files, tuple) else files
        self.files = files
        submit = {} if thread else {"submit": self.jobs.append}
        self.tiers = KVTiers(self.kv, self.io, host_blocks, files, cost=cost, clock=self.clock, **submit, **options)

    def clock(self):
        return self.now or time.monotonic()

    def work(self):
        while self.jobs:
            self.jobs.popleft()()

    @staticmethod
    def content(prefix, namespace=ANYONE):
        """What a block holds that ends with this prefix."""
        return np.frombuffer(sha256(repr(namespace).encode() + prefix.tobytes()).digest(), np.uint8)

    def compute(self, tokens, namespace=ANYONE):
        """A request's life: reuse, allocate, write what is missing, commit, release. How many tokens were reused."""
        tokens = np.asarray(tokens, np.int32)
        match = self.kv.match(tokens, namespace, tokens.size)
        whole = match.tokens // self.size
        self.check(tokens, match.blocks[:whole], namespace)
        fresh = self.kv.allocate(-(-tokens.size // self.size) - whole)
        if match.blocks.size > whole:
            self.kv.release(match.blocks[whole:])
        if fresh is None:
            self.kv.release(match.blocks[:whole])
            return None
        self.tiers.flush()  # as the device does before a step
        blocks = np.concatenate([match.blocks[:whole], fresh])
        for index in range(whole, tokens.size // self.size):
            self.io.pool[blocks[index]] = self.content(tokens[: (index + 1) * self.size], namespace)
        self.kv.commit(tokens, blocks, namespace)
        self.kv.release(blocks)
        return whole * self.size

    def check(self, tokens, blocks, namespace=ANYONE):
        for index, block in enumerate(blocks):
            expected = self.content(tokens[: (index + 1) * self.size], namespace)
            assert (self.io.pool[block] == expected).all(), f"block {index} of a hit holds something else"

    def wish(self, tokens, namespace=ANYONE):
        tokens = np.asarray(tokens, np.int32)
        return self.tiers.wish(tokens, namespace, tokens.size)

    def fetch(self, tokens, namespace=ANYONE):
        """Ask, let the copier work, and say how many tokens are in the pool then."""
        wish = self.wish(tokens, namespace)
        self.tiers.fetcher.is_coming(wish)
        self.work()
        return self.cached(tokens, namespace)

    def cached(self, tokens, namespace=ANYONE):
        tokens = np.asarray(tokens, np.int32)
        match = self.kv.match(tokens, namespace, tokens.size, record=False)
        self.check(tokens, match.blocks[: match.tokens // self.size], namespace)
        self.kv.release(match.blocks)
        return match.tokens

    def close(self):
        """Nothing may be left."""
        self.work()
        self.tiers.close()
        self.tiers.check_integrity()
        self.kv.check_integrity([])
        assert self.kv.available() == self.kv.num_blocks


@pytest.fixture
def bed():
    beds = []

    def make(*args, **options):
        beds.append(Bed(*args, **options))
        return beds[-1]

    yield make
    for each in beds:
        each.close()


@pytest.fixture
def run():
    """`run(3, 8)` is the prompt 3, 3, ... of 8 tokens, with the position in each token."""
    return lambda name, count: np.arange(count, dtype=np.int32) + 1000 * name
