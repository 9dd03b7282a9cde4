"""Many threads use one cache; a block is never in two hands, and at the end the books balance."""

from __future__ import annotations

import sys
import threading
from itertools import count

import numpy as np
import pytest

from sageLLM.kv_runtime import KVCache, KVEviction, make_eviction_policy

ANYONE = ("", "")


@pytest.fixture
def busy_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("busy_switching")
@pytest.mark.parametrize("ttl_s", [0, 200])
@pytest.mark.parametrize("eviction", KVEviction)
def test_hammer(eviction, ttl_s):
    """A second passes each time that the cache looks at its clock."""
    cache = KVCache(64, 4, policy=make_eviction_policy(eviction), ttl_s=ttl_s, clock=count().__next__)
    holder = np.zeros(64, dtype=np.int64)  # which thread writes to a block it took
    failures = []
    held = [[] for _ in range(4)]

    def work(me):
        rng = np.random.default_rng(me)
        for _ in range(400):
            prompt = rng.integers(0, 2, int(rng.integers(1, 40))).astype(np.int32)
            found = cache.match(prompt, ANYONE, prompt.size - 1)
            whole = found.tokens // 4
            fresh = cache.allocate(-(-prompt.size // 4) - whole)
            if found.blocks.size > whole:
                cache.release(found.blocks[whole:])
            if fresh is None:
                cache.release(found.blocks[:whole])
                continue
            if holder[fresh].any():
                failures.append((me, fresh, holder[fresh]))
            holder[fresh] = me
            blocks = np.append(found.blocks[:whole], fresh)
            cache.commit(prompt, blocks, ANYONE)
            cache.available()
            cache.stats()
            holder[fresh] = 0
            if rng.random() < 0.02 and len(held[me - 1]) < 2:
                held[me - 1].append(blocks)
            else:
                cache.release(blocks)

    def guarded(me):
        try:
            work(me)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(me,)) for me in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    cache.check_integrity([blocks for mine in held for blocks in mine])
    stats = cache.stats()
    assert stats.queries == 1600
    assert stats.hits > 0
    assert stats.evicted_blocks > 0
