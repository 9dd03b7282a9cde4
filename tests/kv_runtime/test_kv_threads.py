"""Many threads use all of one cache; a block is never in two hands, and at the end the books balance."""

from __future__ import annotations

import sys
import threading
from itertools import count

import numpy as np
import pytest

from sageLLM.kv_runtime import Commit, KVCache, KVEventLog, KVEviction, Want, block_hashes, make_eviction_policy

NAMESPACES = (("", ""), ("a", ""))
BLOCKS, SIZE, TURNS = 64, 4, 300


@pytest.fixture
def busy_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Hammer:
    """Threads that each own what they were given, and say so."""

    def __init__(self, cache):
        self.cache = cache
        self.holder = np.zeros(BLOCKS, dtype=np.int64)  # which thread writes to a block that it took
        self.held = []  # blocks that are never given back
        self.failures = []
        self.queries = 0
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def run(self, *workers):
        threads = [threading.Thread(target=self._guarded, args=(work, me)) for me, work in enumerate(workers, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self.failures

    def _guarded(self, work, me):
        try:
            work(me, np.random.default_rng(me))
        except Exception as error:
            self.failures.append(error)
            self.stop.set()

    def produce(self, me, rng):
        """Sequences: matched or acquired, computed, committed, sometimes pinned or kept, given back."""
        cache, pinned = self.cache, []
        for _ in range(TURNS):
            if self.stop.is_set():
                return
            prompt = rng.integers(0, 2, int(rng.integers(1, 40))).astype(np.int32)
            namespace = NAMESPACES[int(rng.integers(2))]
            match = cache.match if rng.random() < 0.5 else self._acquire
            found = match(prompt, namespace, prompt.size - 1)
            with self._lock:
                self.queries += 1
            if found is None:
                continue
            whole = found.tokens // SIZE
            fresh = cache.allocate(-(-prompt.size // SIZE) - whole)
            cache.release(found.blocks[whole:])
            if fresh is None:
                cache.release(found.blocks[:whole])
                continue
            self._write(me, fresh)
            blocks = np.append(found.blocks[:whole], fresh).astype(np.int32)
            pin = len(pinned) < 2 and rng.random() < 0.05
            cache.commit_all([Commit(prompt, blocks, namespace, pin=pin)])
            self.holder[fresh] = 0
            if pin:
                pinned.append((prompt, namespace))
                (cached,) = cache.count_cached([(np.append(prompt, prompt[:1]), namespace)])
                if cached < prompt.size:
                    self.failures.append(f"a pinned prompt of {prompt.size} tokens has {cached} cached")
            if rng.random() < 0.05 and pinned:
                cache.unpin(*pinned.pop(int(rng.integers(len(pinned)))))
            if rng.random() < 0.01:
                self.held.append(blocks)
            else:
                cache.release(blocks)
        for pin in pinned:
            cache.unpin(*pin)

    def _acquire(self, prompt, namespace, limit):
        acquired = self.cache.acquire([Want(prompt, namespace, limit)])
        if not acquired:
            with self._lock:
                self.queries -= 1  # what does not fit is not counted
            return None
        ((found, fresh),) = acquired
        self.cache.release(fresh)
        return found

    def _write(self, me, blocks):
        if self.holder[blocks].any():
            self.failures.append((me, blocks, self.holder[blocks]))
        self.holder[blocks] = me

    def step(self, me, rng):
        """The step loop: blocks for rows that grow, given back all at once."""
        for _ in range(TURNS):
            rows = [self.cache.allocate(int(rng.integers(0, 5))) for _ in range(3)]
            taken = [blocks for blocks in rows if blocks is not None]
            for blocks in taken:
                self._write(me, blocks)
                self.cache.retain(blocks)
            for blocks in taken:
                self.holder[blocks] = 0
                self.cache.release(np.concatenate([blocks, blocks]))

    def look(self, me, rng):
        """Whoever watches: nothing that it reads may be out of bounds, whenever it reads."""
        for _ in range(TURNS):
            stats = self.cache.stats()
            assert stats.free_blocks + stats.evictable_blocks <= BLOCKS
            assert stats.pinned_blocks <= stats.cached_blocks <= BLOCKS
            assert 0 <= self.cache.available() <= BLOCKS
            assert 0 <= self.cache.usage() <= 1
            assert self.cache.block_times().lifetime.count >= 0
            if rng.random() < 0.02:
                self.cache.check_integrity()


@pytest.mark.usefixtures("busy_switching")
@pytest.mark.parametrize("ttl_s", [0, 2000])
@pytest.mark.parametrize("eviction", KVEviction)
def test_hammer(eviction, ttl_s):
    """A second passes each time that the cache looks at its clock."""
    cache = KVCache(BLOCKS, SIZE, policy=make_eviction_policy(eviction), ttl_s=ttl_s, clock=count().__next__)
    log = KVEventLog(BLOCKS, SIZE, 10**6)
    cache.listen(log)
    hammer, events = Hammer(cache), []

    def read(me, rng):
        for _ in range(TURNS):
            events.extend(log.take())

    hammer.run(hammer.produce, hammer.produce, hammer.produce, hammer.step, hammer.look, read)
    cache.check_integrity(hammer.held)
    stats = cache.stats()
    assert stats.queries == hammer.queries
    assert stats.hits > 0
    assert stats.evicted_blocks > 0
    assert stats.pinned_blocks == 0
    assert stored_by(events + log.take()) == full_blocks(cache)


def stored_by(events):
    stored = set()
    assert [event.seq for event in events] == [*range(len(events))]
    for event in events:
        names = {(event.tenant, name) for name in event.block_hashes}
        assert names.isdisjoint(stored) if event.kind == "stored" else names <= stored
        stored ^= names
    return stored


def full_blocks(cache):
    found = set()
    for node in cache._tree.nodes():
        (tenant, salt), tokens = node.prefix()
        found |= {(tenant, name) for name in block_hashes(tokens, SIZE, tenant, salt)}
    return found
