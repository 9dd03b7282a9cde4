"""`check_integrity` finds books that were tampered with, and says what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from sageLLM.errors import KVCacheError
from sageLLM.kv_runtime import KVCache, KVEviction, make_eviction_policy
from sageLLM.kv_runtime.node import NO_TOKENS, Node

ANYONE = ("", "")


def make_cache(tokens, store, eviction):
    cache = KVCache(12, 4, policy=make_eviction_policy(eviction))
    store(cache, tokens(10))
    store(cache, np.append(tokens(6), tokens(4, 100)))
    cache.allocate(1)
    cache.check_integrity()
    return cache


@pytest.fixture
def cache(tokens, store):
    """Two cached sequences that branch inside a block, and one owned block."""
    return make_cache(tokens, store, KVEviction.LRU)


def branch(cache):
    upper = next(iter(cache._tree._roots[ANYONE].children.values()))
    return upper, next(iter(upper.children.values()))


def rename_first_token(cache):
    upper, lower = branch(cache)
    upper.children[77] = upper.children.pop(lower.tokens.item(0))


def swap_recency(cache):
    cache._tree._policy._recency.move_to_end(branch(cache)[1])


def list_a_free_block_twice(cache):
    cache._pool._stack[0] = cache._pool._stack[1]


def free_an_owned_block(cache):
    cache._pool._stack[0] = int(cache._pool.owners.counts.argmax())


def free_a_cached_block(cache):
    cache._pool._stack[0] = branch(cache)[0].blocks[0]


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (list_a_free_block_twice, "on the free list more than once"),
        (free_an_owned_block, "on the free list but a sequence owns it"),
        (free_a_cached_block, "on the free list but the prefix tree refers to it"),
        (lambda c: setattr(c._pool, "num_free", c._pool.num_free - 1), "referenced by nobody but not on the free list"),
        (lambda c: setattr(c._pool, "num_evictable", 1), "num_evictable says 1, but"),
        (lambda c: setattr(c._pool, "num_cached", 1), "num_cached says 1, but"),
        (lambda c: c._pool.tree.counts.__setitem__(branch(c)[0].blocks[0], 5), "in 1 tree nodes, but 5 references"),
        (lambda c: c._pool.owners.counts.__setitem__(11, -1), "negative number of owners"),
        (lambda c: c._pool.tree.counts.__setitem__(11, -1), "negative number of references of the tree"),
        (lambda c: setattr(branch(c)[0], "end", 7), "holds 6 tokens"),
        (lambda c: setattr(branch(c)[1], "start", 7), "does not begin where its parent ends"),
        (lambda c: setattr(branch(c)[1], "blocks", branch(c)[1].blocks[:1]), "holds 1 blocks of 4 tokens"),
        (rename_first_token, "not its parent's child under its first token"),
        (swap_recency, "used after its parent"),
        (lambda c: c._tree._policy.unlist(branch(c)[1]), "neither listed for eviction nor parked"),
        (lambda c: c._tree._park(branch(c)[1]), "which nobody owns"),
        (lambda c: c._tree._policy.touch([Node(None, 0, NO_TOKENS, NO_TOKENS)]), "a node that is not in the tree"),
        (lambda c: c._tree._roots.__setitem__(("x", ""), c._tree._roots[ANYONE]), r"namespace \('x', ''\)"),
    ],
)
def test_tampering_is_found(cache, tamper, message):
    tamper(cache)
    with pytest.raises(KVCacheError, match=message):
        cache.check_integrity()


@pytest.mark.parametrize("eviction", [KVEviction.LFU, KVEviction.COST])
@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda policy: policy._heap.reverse(), "not where priority .* belongs in the eviction heap"),
        (lambda policy: policy._heap.pop(), "listed for eviction, but the heap has 0 of it"),
        (lambda policy: policy._heap.append(max(policy._heap)), "listed for eviction, but the heap has 2 of it"),
        (lambda policy: policy._listed.clear(), "neither listed for eviction nor parked"),
        (lambda policy: setattr(policy._heap[0][2], "hits", -1), "its last use gave it less"),
        (lambda policy: setattr(policy._heap[0][2], "used_at", 9.0), "its last use gave it less"),
        (lambda policy: policy.unlist(policy.victim()), "neither listed for eviction nor parked"),
    ],
)
def test_a_wrong_ranking_is_found(tokens, store, eviction, tamper, message):
    cache = make_cache(tokens, store, eviction)
    tamper(cache._tree._policy)
    with pytest.raises(KVCacheError, match=message):
        cache.check_integrity()


def test_leaks_and_double_releases_are_told_apart(cache):
    owned = np.flatnonzero(cache._pool.owners.counts).astype(np.int32)
    cache.check_integrity([owned])
    with pytest.raises(KVCacheError, match="1 owners, but 0 were declared: a release is missing"):
        cache.check_integrity([])
    with pytest.raises(KVCacheError, match="1 owners, but 2 were declared: it was released too often"):
        cache.check_integrity([owned, owned])
