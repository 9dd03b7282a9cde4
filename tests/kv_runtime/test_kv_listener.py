"""A listener hears of every change of the tree, so that it can tell at any time what is cached."""

from __future__ import annotations

import numpy as np
import pytest

from sageLLM.kv_runtime import KVCache, KVEviction, make_eviction_policy

ANYONE = ("", "")


class Mirror:
    """Every cached prefix, by hearsay."""

    def __init__(self, block_size):
        self.size = block_size
        self.cached = set()
        self.told = []

    def _prefixes(self, node, start):
        namespace, tokens = node.prefix()
        assert tokens.size == node.end
        assert node.blocks.size == (node.end - 1) // self.size - node.start // self.size + 1
        return {(namespace, *tokens[: p + 1].tolist()) for p in range(start, node.end)}

    def stored(self, node, start):
        prefixes = self._prefixes(node, start)
        assert not prefixes & self.cached
        self.cached |= prefixes
        self.told.append(("stored", start, node.end))

    def removed(self, node, start):
        prefixes = self._prefixes(node, start)
        assert prefixes <= self.cached
        assert start == node.start or start % self.size == 0
        self.cached -= prefixes
        self.told.append(("removed", start, node.end))

    def cleared(self):
        self.cached.clear()
        self.told.append(("cleared",))


@pytest.fixture
def heard():
    def make(num_blocks=8, **options):
        cache = KVCache(num_blocks, 4, **options)
        mirror = Mirror(4)
        cache.listen(mirror)
        return cache, mirror

    return make


def test_what_is_committed_is_stored_once(heard, tokens, store):
    cache, mirror = heard()
    store(cache, tokens(6))
    store(cache, tokens(6))
    store(cache, tokens(11))
    assert mirror.told == [("stored", 0, 6), ("stored", 6, 11)]


def test_what_is_evicted_is_removed_before_its_blocks_are_free(heard, tokens, store):
    cache, mirror = heard()
    store(cache, tokens(10))
    free = []
    removed = mirror.removed
    mirror.removed = lambda node, start: (free.append(cache.num_free), removed(node, start))
    cache.allocate(6)
    assert mirror.told == [("stored", 0, 10), ("removed", 8, 10)]
    assert free == [5]
    cache.allocate(2)
    assert mirror.told[2:] == [("removed", 0, 8)]
    assert not mirror.cached


def test_what_has_expired_is_removed(heard, tokens, store):
    now = [0.0]
    cache, mirror = heard(ttl_s=5, clock=lambda: now[0])
    store(cache, tokens(6))
    now[0] = 5.0
    cache.count_cached([(tokens(6), ANYONE)])
    assert mirror.told == [("stored", 0, 6), ("removed", 0, 6)]


def test_all_is_cleared_at_once(heard, tokens, store):
    cache, mirror = heard()
    store(cache, tokens(6))
    cache.clear()
    assert mirror.told == [("stored", 0, 6), ("cleared",)]


@pytest.mark.parametrize("eviction", KVEviction)
def test_hearsay_is_what_the_cache_finds(heard, eviction):
    """Random sequences in two namespaces; a mirror of the notices knows at any time what a lookup finds."""
    rng = np.random.default_rng(5)
    now = [0.0]
    policy = make_eviction_policy(eviction)
    cache, mirror = heard(24, policy=policy, ttl_s=50, clock=lambda: now[0])
    for _ in range(400):
        now[0] += 1
        namespace = ("", "ab"[int(rng.integers(2))])
        prompt = rng.integers(0, 2, int(rng.integers(1, 30))).astype(np.int32)
        found = cache.match(prompt, namespace, prompt.size)
        known = [(namespace, *prompt[:n].tolist()) in mirror.cached for n in range(1, prompt.size + 1)]
        assert known == [True] * found.tokens + [False] * (prompt.size - found.tokens)
        whole = found.tokens // 4
        fresh = cache.allocate(-(-prompt.size // 4) - whole)
        cache.release(found.blocks[whole:])
        blocks = np.append(found.blocks[:whole], fresh).astype(np.int32)
        cache.commit(prompt, blocks, namespace)
        cache.release(blocks)
        if rng.random() < 0.01:
            cache.clear()
    assert {each[0] for each in mirror.told} == {"stored", "removed", "cleared"}
