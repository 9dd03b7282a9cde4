"""What a caller may rely on."""

from __future__ import annotations

import numpy as np
import pytest

from sageLLM.errors import KVCacheError
from sageLLM.kv_runtime import Commit, KVCache, Want

ANYONE = ("", "")


def test_prefix_ends_at_any_token(tokens, store):
    cache = KVCache(8, 4)
    blocks = store(cache, tokens(10))
    found = cache.match(np.append(tokens(6), 99), ANYONE, 100)
    assert found.tokens == 6
    assert found.blocks.tolist() == blocks[:2].tolist()


def test_limit_bounds_the_match(tokens, store):
    cache = KVCache(8, 4)
    store(cache, tokens(8))
    assert [cache.match(tokens(8), ANYONE, limit).tokens for limit in (-1, 0, 1, 7, 8, 99)] == [0, 0, 1, 7, 8, 8]


@pytest.mark.parametrize("other", [("b", "salt"), ("a", ""), ("", "salt"), ("asalt", ""), ("", "asalt"), ("salt", "a")])
def test_namespaces_never_share(tokens, store, cached_length, other):
    cache = KVCache(8, 4)
    store(cache, tokens(8), ("a", "salt"))
    assert cached_length(cache, tokens(8), other) == 0
    assert cached_length(cache, tokens(8), ("a", "salt")) == 8


@pytest.mark.parametrize("off", [{"enable_prefix_caching": False}, {"share_across_requests": False}])
def test_without_sharing_nothing_is_kept(tokens, store, cached_length, off):
    cache = KVCache(8, 4, **off)
    store(cache, tokens(8))
    assert cached_length(cache, tokens(8)) == 0
    assert cache.num_free == 8


def test_matched_blocks_survive_until_released(tokens, store):
    cache = KVCache(4, 4)
    store(cache, tokens(16))
    found = cache.match(tokens(5), ANYONE, 5)
    assert cache.available() == 2
    assert cache.allocate(3) is None
    taken = cache.allocate(2)
    assert not set(taken.tolist()) & set(found.blocks.tolist())
    cache.release(found.blocks)
    assert cache.available() == 2
    cache.check_integrity([taken])


def test_owner_appends_past_a_committed_partial_block(tokens, cached_length):
    cache = KVCache(8, 4)
    blocks = cache.allocate(3)
    assert cache.commit(tokens(6), blocks, ANYONE) == 6
    assert cache.commit(tokens(11), blocks, ANYONE) == 5
    assert cache.commit(tokens(11), blocks, ANYONE) == 0
    assert cached_length(cache, tokens(12)) == 11
    assert cache.stats().cached_blocks == 3
    cache.check_integrity([blocks])


def test_a_longer_copy_replaces_a_partial_block(tokens, store):
    """A next turn's copy of the last block holds all that the first one did, so the first is given back."""
    cache = KVCache(8, 4)
    store(cache, tokens(6))
    found = cache.match(tokens(8), ANYONE, 7)
    copy = cache.allocate(1)
    cache.release(found.blocks[-1:])
    mine = np.append(found.blocks[:1], copy)
    cache.commit(tokens(8), mine, ANYONE)
    cache.release(mine)
    assert cache.stats().cached_blocks == 2
    assert cache.match(tokens(8), ANYONE, 8).blocks.tolist() == mine.tolist()


def test_a_branch_inside_a_block_keeps_both_copies(tokens, store):
    cache = KVCache(8, 4)
    first = store(cache, tokens(6))
    branch = np.append(tokens(5), [70, 71, 72]).astype(np.int32)
    second = store(cache, branch)
    assert cache.match(tokens(6), ANYONE, 6).blocks.tolist() == first.tolist()
    assert cache.match(branch, ANYONE, 8).blocks.tolist() == [first[0], second[1]]
    assert cache.match(tokens(5), ANYONE, 5).blocks.tolist() == first.tolist()
    assert cache.num_free == 5


def test_statistics_count_recorded_queries_only(tokens, store):
    cache = KVCache(8, 4)
    store(cache, tokens(6))
    cache.match(tokens(8), ANYONE, 7)
    cache.match(tokens(3, 50), ANYONE, 2)
    cache.match(tokens(8), ANYONE, 7, record=False)
    stats = cache.stats()
    assert (stats.queries, stats.queried_tokens, stats.hits, stats.hit_tokens) == (2, 11, 1, 6)
    assert (stats.committed_tokens, stats.cached_blocks, stats.free_blocks, stats.total_blocks) == (6, 2, 6, 8)


def test_clear_forgets_all_but_takes_nothing_from_owners(tokens, store, cached_length):
    cache = KVCache(8, 4)
    store(cache, tokens(8))
    mine = cache.allocate(2)
    cache.commit(tokens(8, 50), mine, ANYONE)
    cache.clear()
    assert cached_length(cache, tokens(8)) == cached_length(cache, tokens(8, 50)) == 0
    assert cache.num_free == 6
    cache.check_integrity([mine])
    assert cache.commit(tokens(8, 50), mine, ANYONE) == 8


def test_empty_sequences_are_fine(tokens):
    cache = KVCache(4, 4)
    assert cache.commit(tokens(0), tokens(0), ANYONE) == 0
    assert cache.match(tokens(0), ANYONE, 5).tokens == 0
    assert cache.allocate(0).size == 0
    cache.release(tokens(0))


def test_too_large_an_allocation_takes_nothing(tokens, store, cached_length):
    cache = KVCache(4, 4)
    store(cache, tokens(8))
    assert cache.allocate(5) is None
    assert cached_length(cache, tokens(8)) == 8


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda c: c.release([0]), "block 0 .* release each block as often"),
        (lambda c: c.release(np.zeros(200, np.int32)), "block 0 .* release each block as often"),
        (lambda c: c.retain([3]), "block 3 is free"),
        (lambda c: c.retain([-1]), "block -1 is not of this pool: its blocks are 0 to 299"),
        (lambda c: c.retain([300]), "block 300 is not of this pool"),
        (lambda c: c.retain(np.arange(200, 400)), "block 399 is not of this pool"),
        (lambda c: c.commit(np.arange(8), [1, 2], ("", "")), "block 1 is free"),
        (lambda c: c.commit(np.arange(9), [1, 2], ("", "")), "9 tokens need 3 blocks of 4, found 2"),
        (lambda c: c.allocate(-1), "cannot allocate -1 blocks"),
        (lambda c: KVCache(0, 16), "pool of 0 blocks"),
        (lambda c: KVCache(1, 0), "block of 0 tokens"),
    ],
)
def test_misuse_is_refused_and_changes_nothing(misuse, message):
    cache = KVCache(300, 4)
    with pytest.raises(KVCacheError, match=message):
        misuse(cache)
    cache.check_integrity([])
    assert cache.num_free == 300


@pytest.mark.parametrize("count", [3, 200])
def test_a_refused_release_gives_back_what_it_took(count):
    cache = KVCache(300, 4)
    mine = cache.allocate(count)
    with pytest.raises(KVCacheError):
        cache.release(np.append(mine, mine[-1:]))
    cache.check_integrity([mine])


@pytest.mark.parametrize("count", [3, 200])
def test_one_call_may_name_a_block_several_times(count):
    cache = KVCache(300, 4)
    mine = cache.allocate(count)
    cache.retain(np.repeat(mine, 3))
    cache.check_integrity([mine] * 4)
    cache.release(np.tile(mine, 4))
    assert cache.num_free == 300
    cache.check_integrity([])


def test_a_refused_commit_leaves_the_tree_as_it_was(tokens, store, cached_length):
    cache = KVCache(8, 4)
    store(cache, tokens(8))
    free = cache.allocate(3)
    cache.release(free)
    with pytest.raises(KVCacheError, match="is free"):
        cache.commit(np.append(tokens(6), tokens(6, 50)), free, ANYONE)
    cache.check_integrity([])
    assert cached_length(cache, tokens(8)) == 8


def test_of_several_commits_all_or_none_are_entered(tokens, store, cached_length):
    cache = KVCache(8, 4)
    mine = cache.allocate(2)
    with pytest.raises(KVCacheError, match="block 7 is free"):
        cache.commit_all([Commit(tokens(8), mine, ANYONE), Commit(tokens(4, 50), tokens(1, 7), ANYONE)])
    assert cached_length(cache, tokens(8)) == 0
    assert cache.commit_all([Commit(tokens(6), mine, ANYONE), Commit(tokens(8), mine, ANYONE)]) == 8
    assert cache.count_cached([(tokens(8), ANYONE), (tokens(9), ANYONE), (tokens(4, 50), ANYONE)]) == [7, 8, 0]
    cache.check_integrity([mine])


@pytest.mark.parametrize("touch", [True, False])
def test_what_was_looked_up_is_evicted_last_if_touched(tokens, store, cached_length, touch):
    cache = KVCache(4, 4)
    store(cache, tokens(8))
    store(cache, tokens(8, 50))
    assert cache.count_cached([(tokens(9), ANYONE)], touch=touch) == [8]
    cache.allocate(2)
    assert cached_length(cache, tokens(8)) == (8 if touch else 0)


def test_acquire_matches_and_allocates_for_each_in_turn(tokens, store):
    cache = KVCache(16, 4)
    cached = store(cache, tokens(10))
    wants = [Want(tokens(12), ANYONE, 11), Want(tokens(7, 50), ANYONE, 6, spare=2), Want(tokens(8), ANYONE, 0)]
    first, second, third = cache.acquire(wants)
    assert (first.match.tokens, first.match.blocks.tolist(), first.fresh.size) == (10, cached.tolist(), 1)
    assert (second.match.tokens, second.fresh.size) == (0, 4)
    assert (third.match.tokens, third.fresh.size) == (0, 2)
    cache.check_integrity([first.match.blocks, first.fresh, second.fresh, third.fresh])
    assert (cache.stats().queries, cache.stats().hit_tokens) == (3, 10)


@pytest.mark.parametrize(("blocks", "granted"), [(8, 3), (7, 3), (6, 2), (5, 1), (3, 1), (2, 0)])
def test_acquire_stops_at_the_first_that_does_not_fit(tokens, store, blocks, granted):
    """A matched block that could be evicted counts once: afterwards it is owned."""
    cache = KVCache(blocks, 4)
    cached = store(cache, tokens(8))
    wants = [Want(np.append(tokens(8), tokens(4, 10 * n)).astype(np.int32), ANYONE, 11) for n in (5, 6)]
    got = cache.acquire([wants[0], Want(tokens(12, 100), ANYONE, 11), wants[1], Want(tokens(99), ANYONE, 98)])
    assert len(got) == granted
    cache.check_integrity([array for each in got for array in (each.match.blocks, each.fresh)])
    assert cache.stats().queries == granted
    assert all(each.match.blocks.tolist() in ([], cached.tolist()) for each in got)


def test_a_million_blocks(tokens, cached_length):
    """The structures are sized by the pool; using them is not."""
    cache = KVCache(1_000_000, 16)
    rng = np.random.default_rng(0)
    long = rng.integers(0, 150_000, 32_768, dtype=np.int32)
    blocks = cache.allocate(2048)
    cache.commit(long, blocks, ANYONE)
    assert cache.match(long, ANYONE, 32_767).tokens == 32_767
    cache.release(np.append(blocks, blocks))
    everything = cache.allocate(1_000_000)
    assert np.array_equal(np.sort(everything), np.arange(1_000_000))
    assert cached_length(cache, long) == 0
    assert cache.stats().evicted_blocks == 2048
    cache.check_integrity([everything])
