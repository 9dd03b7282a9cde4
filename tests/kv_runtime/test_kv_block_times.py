"""BlockTimes: lifetimes, idle times and gaps between uses, in seconds and blocks."""

from __future__ import annotations

import numpy as np
import pytest

from sageLLM.kv_runtime import KVCache, Want, block_times
from sageLLM.kv_runtime.block_times import BlockTimes

ANYONE = ("", "")


@pytest.fixture
def make_cache(monkeypatch, clock):
    def make(num_blocks=8, every=1):
        monkeypatch.setattr(block_times, "SAMPLED", every)
        return KVCache(num_blocks, 4, clock=clock)

    return make


def reuse(cache, prompt):
    ((match, fresh),) = cache.acquire([Want(prompt, ANYONE, prompt.size - 1)])
    cache.release(np.concatenate([match.blocks, fresh]))


def test_lifetime_and_idle_time_of_what_is_evicted(make_cache, clock, tokens, store):
    cache = make_cache()
    store(cache, tokens(16))
    clock.now = 10.0
    reuse(cache, tokens(17))
    clock.now = 25.0
    cache.allocate(5)  # one block of four
    clock.now = 100.0
    cache.allocate(3)
    times = cache.block_times()
    assert (times.lifetime.count, times.lifetime.sum) == (4, 25 + 3 * 100)
    assert (times.idle_before_evict.count, times.idle_before_evict.sum) == (4, 15 + 3 * 90)
    assert (times.reuse_gap.count, times.reuse_gap.sum) == (4, 4 * 10)


def test_a_branch_is_used_apart_from_what_it_leaves(make_cache, clock, tokens, store):
    cache = make_cache(16)
    store(cache, tokens(16))
    clock.now = 3.0
    reuse(cache, np.append(tokens(8), tokens(4, 50)))  # splits the run, and uses its first half
    clock.now = 5.0
    reuse(cache, tokens(17))
    times = cache.block_times()
    assert (times.reuse_gap.count, times.reuse_gap.sum) == (6, 2 * 3 + 2 * 2 + 2 * 5)


def test_looking_is_no_use_and_nor_is_computing(make_cache, clock, tokens, store):
    cache = make_cache()
    store(cache, tokens(8))
    clock.now = 4.0
    cache.count_cached([(tokens(8), ANYONE)])
    store(cache, tokens(8))
    assert cache.block_times().reuse_gap.count == 0


def test_some_are_watched_and_the_rest_forgotten_with_everything(make_cache, clock, tokens, store):
    cache = make_cache(16, every=4)
    for n in range(8):
        store(cache, tokens(4, 10 * n))
    clock.now = 1.0
    cache.allocate(16)
    assert cache.block_times().lifetime.count == 2
    assert not cache._tree.watch._stored_and_used


def test_the_sum_of_several_workers(make_cache, clock, tokens, store):
    caches = [make_cache(), make_cache()]
    for cache in caches:
        store(cache, tokens(8))
        clock.now += 1.0
        cache.allocate(8)
    lifetime = BlockTimes.merged(cache.block_times() for cache in caches).lifetime
    assert (lifetime.count, lifetime.sum, lifetime.maximum) == (4, 4.0, 1.0)
    assert lifetime.quantile(0.5) == pytest.approx(1.0, rel=0.01)
