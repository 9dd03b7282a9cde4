"""What nobody used for `ttl_s` seconds is forgotten, by a clock that the test holds."""

from __future__ import annotations

import numpy as np
import pytest

from sageLLM.errors import KVCacheError
from sageLLM.kv_runtime import KVCache, KVEviction, make_eviction_policy

ANYONE = ("", "")

pytestmark = pytest.mark.parametrize("eviction", KVEviction)


@pytest.fixture
def cache(clock, eviction):
    return KVCache(64, 4, policy=make_eviction_policy(eviction), ttl_s=10, clock=clock)


def test_an_unused_prefix_is_forgotten_and_a_used_one_is_not(cache, clock, tokens, store, cached_length):
    used, unused = tokens(8), tokens(8, 100)
    store(cache, used)
    store(cache, unused)
    clock.now = 6
    cache.count_cached([(np.append(used, 0).astype(np.int32), ANYONE)])
    clock.now = 9.9
    assert [cached_length(cache, s) for s in (used, unused)] == [8, 8], "looking without a trace is no use"
    clock.now = 10
    assert [cached_length(cache, s) for s in (used, unused)] == [8, 0]
    assert cache.stats().evicted_blocks == 2
    cache.check_integrity([])
    clock.now = 16
    assert cached_length(cache, used) == 0
    assert cache.num_free == 64


def test_of_a_prefix_the_part_that_is_used_stays(cache, clock, tokens, store, cached_length):
    store(cache, tokens(16))
    clock.now = 9
    cache.release(cache.match(tokens(8), ANYONE, 8).blocks)
    clock.now = 18
    assert cached_length(cache, tokens(16)) == 8
    assert cache.num_free == 62


def test_allocating_forgets_too(cache, clock, tokens, store):
    store(cache, tokens(16))
    clock.now = 10
    assert cache.num_free == 60
    cache.allocate(1)
    assert cache.num_free == 63


def test_blocks_of_a_forgotten_prefix_stay_with_their_owner(cache, clock, tokens, cached_length):
    running = cache.allocate(4)
    cache.commit(tokens(16), running, ANYONE)
    clock.now = 10
    assert cached_length(cache, tokens(16)) == 0
    assert cache.num_free == 60
    cache.check_integrity([running])
    cache.commit(tokens(16), running, ANYONE)
    assert cached_length(cache, tokens(16)) == 16
    cache.release(running)
    assert cached_length(cache, tokens(16)) == 16


def test_a_leaf_that_eviction_had_passed_over_is_forgotten(cache, clock, tokens, store, cached_length):
    running = cache.allocate(2)
    cache.commit(tokens(8), running, ANYONE)
    clock.now = 1
    store(cache, tokens(8, 100))
    everything = cache.allocate(62)
    cache.check_integrity([running, everything])
    clock.now = 10
    assert cached_length(cache, tokens(8)) == 0
    cache.check_integrity([running, everything])
    cache.release(running)
    assert cache.num_free == 2


def test_many_prefixes_come_and_go_without_leaving_anything_behind(cache, clock, tokens, store):
    for step in range(1000):
        clock.now += 1
        store(cache, tokens(4, step))
        assert cache.stats().cached_blocks <= 10
    cache.check_integrity([])
    assert len(getattr(cache._tree._policy, "_heap", ())) < 100
    cache.clear()
    cache.check_integrity([])


def test_a_wrong_order_is_found(cache, clock, tokens, store):
    store(cache, tokens(10))
    store(cache, np.append(tokens(6), tokens(4, 100)))
    used_at = cache._tree._expiry._used_at
    first = next(iter(used_at))
    used_at[first] = 5.0
    with pytest.raises(KVCacheError, match="was used before the one, or after the parent, that it follows"):
        cache.check_integrity()
    used_at[first] = 0.0
    used_at.move_to_end(first)
    with pytest.raises(KVCacheError, match="was used before the one, or after the parent, that it follows"):
        cache.check_integrity()
    del used_at[first]
    with pytest.raises(KVCacheError, match="2 nodes are listed by their last use, the tree has 3"):
        cache.check_integrity()


def test_a_negative_time_is_refused(eviction):
    with pytest.raises(KVCacheError, match="cannot be kept for -1 s"):
        KVCache(8, 4, policy=make_eviction_policy(eviction), ttl_s=-1)
