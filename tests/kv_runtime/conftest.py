"""Short names for what these tests do over and over."""

from __future__ import annotations

import numpy as np
import pytest

ANYONE = ("", "")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def tokens():
    """`tokens(5)` is 0..4, `tokens(5, 100)` is 100..104."""

    def make(count, begin=0):
        return np.arange(begin, begin + count, dtype=np.int32)

    return make


@pytest.fixture
def store():
    """Compute a sequence whose tokens nobody needs any more: allocate, commit, release. Returns its blocks."""

    def compute(cache, sequence, namespace=ANYONE):
        blocks = cache.allocate(-(-sequence.size // cache.block_size))
        cache.commit(sequence, blocks, namespace)
        cache.release(blocks)
        return blocks

    return compute


@pytest.fixture
def cached_length():
    """Length of the cached prefix, without leaving a trace."""

    def look(cache, sequence, namespace=ANYONE):
        found = cache.match(sequence, namespace, sequence.size, record=False)
        cache.release(found.blocks)
        return found.tokens

    return look
