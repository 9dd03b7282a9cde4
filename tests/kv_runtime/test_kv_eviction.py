"""In which order prefixes are given up, and what never is; least recently used first where no policy is named."""

from __future__ import annotations

import numpy as np
import pytest

from sageLLM.kv_runtime import KVCache, KVEviction, Want, make_eviction_policy

ANYONE = ("", "")


def test_least_recently_used_goes_first(tokens, store, cached_length):
    cache = KVCache(6, 4)
    a, b, c = tokens(8), tokens(8, 100), tokens(8, 200)
    for sequence in (a, b, c):
        store(cache, sequence)
    cache.release(cache.match(a, ANYONE, 8).blocks)
    cache.allocate(2)
    assert [cached_length(cache, s) for s in (a, b, c)] == [8, 0, 8]
    cache.allocate(2)
    assert [cached_length(cache, s) for s in (a, b, c)] == [8, 0, 0]


def test_an_unrecorded_match_is_no_use(tokens, store, cached_length):
    cache = KVCache(4, 4)
    a, b = tokens(8), tokens(8, 100)
    store(cache, a)
    store(cache, b)
    assert cached_length(cache, a) == 8
    cache.allocate(2)
    assert [cached_length(cache, s) for s in (a, b)] == [0, 8]


def test_committing_again_is_a_use(tokens, store, cached_length):
    cache = KVCache(6, 4)
    a, b = tokens(8), tokens(8, 100)
    store(cache, a)
    store(cache, b)
    store(cache, a)
    cache.allocate(4)
    assert [cached_length(cache, s) for s in (a, b)] == [8, 0]


def test_a_long_leaf_is_trimmed_from_its_tail(tokens, store, cached_length):
    cache = KVCache(4, 4)
    store(cache, tokens(15))
    lengths = []
    for _ in range(4):
        assert cache.allocate(1) is not None
        lengths.append(cached_length(cache, tokens(15)))
    assert lengths == [12, 8, 4, 0]
    assert cache.stats().evicted_blocks == 4


def test_branches_go_before_their_common_prefix(tokens, store, cached_length):
    cache = KVCache(4, 4)
    common = tokens(8)
    left, right = np.append(common, tokens(4, 100)), np.append(common, tokens(4, 200))
    for branch in (left, right):
        found = cache.match(branch, ANYONE, 12)
        mine = np.append(found.blocks, cache.allocate(3 - found.blocks.size))
        cache.commit(branch, mine, ANYONE)
        cache.release(mine)
    assert cache.num_free == 0
    lengths = []
    for _ in range(4):
        cache.allocate(1)
        lengths.append([cached_length(cache, branch) for branch in (left, right)])
    assert lengths == [[8, 12], [8, 8], [4, 4], [0, 0]]


def test_a_split_makes_the_unused_tail_the_older_part(tokens, store, cached_length):
    cache = KVCache(7, 4)
    old, other = tokens(16), np.append(tokens(8), tokens(4, 100))
    store(cache, old)
    store(cache, other)
    cache.allocate(4)  # two free, the two of old's tail
    assert [cached_length(cache, s) for s in (old, other)] == [8, 12]


def test_a_match_lets_what_it_does_not_use_age(tokens, store, cached_length):
    cache = KVCache(8, 4)
    long, other = tokens(16), tokens(16, 100)
    store(cache, long)
    store(cache, other)
    cache.release(cache.match(long, ANYONE, 6).blocks)
    cache.allocate(2)
    assert [cached_length(cache, s) for s in (long, other)] == [8, 16]
    cache.allocate(4)
    assert [cached_length(cache, s) for s in (long, other)] == [6, 0]
    cache.check_integrity()


def test_looking_up_a_prefix_lets_the_rest_age_too(tokens, store, cached_length):
    cache = KVCache(8, 4)
    long, other = tokens(16), tokens(16, 100)
    store(cache, long)
    store(cache, other)
    assert cache.count_cached([(tokens(9), ANYONE)]) == [8]
    cache.allocate(6)
    assert [cached_length(cache, s) for s in (long, other)] == [8, 0]


def use(cache, sequence, times=1):
    for _ in range(times):
        cache.release(cache.match(sequence, ANYONE, sequence.size).blocks)


@pytest.mark.parametrize("eviction", [KVEviction.LFU, KVEviction.COST])
def test_what_was_used_often_outlives_what_was_used_last(tokens, store, cached_length, eviction):
    cache = KVCache(4, 4, policy=make_eviction_policy(eviction))
    often, late = tokens(8), tokens(8, 100)
    store(cache, often)
    store(cache, late)
    use(cache, often, 3)
    use(cache, late)
    cache.allocate(2)
    assert [cached_length(cache, s) for s in (often, late)] == [8, 0]


@pytest.mark.parametrize("eviction", [KVEviction.LFU, KVEviction.COST])
def test_what_was_once_used_often_ages(tokens, store, cached_length, eviction):
    cache = KVCache(4, 4, policy=make_eviction_policy(eviction))
    store(cache, tokens(8))
    use(cache, tokens(8), 5)
    for new in range(1, 10):
        store(cache, tokens(8, 100 * new))
    assert cached_length(cache, tokens(8)) == 0


@pytest.mark.parametrize("eviction", [KVEviction.LFU, KVEviction.COST])
def test_asking_again_for_what_does_not_fit_is_no_use(tokens, store, cached_length, eviction):
    cache = KVCache(6, 4, policy=make_eviction_policy(eviction))
    wanted, used = tokens(8), tokens(8, 100)
    store(cache, wanted)
    store(cache, used)
    use(cache, used)
    running = cache.allocate(2)
    for _ in range(5):
        assert cache.acquire([Want(tokens(24), ANYONE, 23)]) == []
    cache.allocate(2)
    assert [cached_length(cache, s) for s in (wanted, used)] == [0, 8]
    cache.release(running)


@pytest.mark.parametrize("eviction", KVEviction)
def test_of_several_that_are_asked_for_at_once_each_is_used_once(tokens, store, eviction):
    """Each splits what the one before it has found."""
    cache = KVCache(32, 4, policy=make_eviction_policy(eviction))
    store(cache, tokens(32))
    asked = [np.append(tokens(length), tokens(4, 100 * length)) for length in (20, 8, 28, 3, 20)]
    got = cache.acquire([Want(prompt, ANYONE, prompt.size - 1) for prompt in asked])
    assert [match.tokens for match, _ in got] == [20, 8, 28, 3, 20]
    cache.check_integrity([blocks for match, fresh in got for blocks in (match.blocks, fresh)])
    if eviction is not KVEviction.LRU:
        hits = {(node.start, node.end): node.hits for node in cache._tree.nodes()}
        assert hits == {(0, 3): 5, (3, 8): 4, (8, 20): 3, (20, 28): 1, (28, 32): 0}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("eviction", KVEviction)
def test_the_ranking_holds_when_blocks_are_released_late(eviction, seed):
    rng = np.random.default_rng(seed)
    cache = KVCache(48, 4, policy=make_eviction_policy(eviction, attention_parity=8))
    held = []
    for _ in range(400):
        prompt = np.append(np.full(4 * rng.integers(1, 4), rng.integers(3)), rng.integers(0, 2, 8)).astype(np.int32)
        found = cache.match(prompt, ANYONE, prompt.size)
        whole = found.tokens // 4
        fresh = cache.allocate(prompt.size // 4 - whole)
        if found.tokens % 4:
            cache.release(found.blocks[whole:])
        blocks = found.blocks[:whole] if fresh is None else np.append(found.blocks[:whole], fresh)
        if fresh is not None:
            cache.commit(prompt, blocks, ANYONE)
        held.append(blocks)
        while len(held) > 6 or (held and rng.random() < 0.3):
            cache.release(held.pop(rng.integers(len(held))))
        cache.check_integrity(held)


def test_committing_is_no_more_frequent_use(tokens, store, cached_length):
    cache = KVCache(6, 4, policy=make_eviction_policy(KVEviction.LFU))
    computed, reused = tokens(8), tokens(8, 100)
    store(cache, reused)
    use(cache, reused)
    for _ in range(5):
        store(cache, computed)
    cache.allocate(4)
    assert [cached_length(cache, s) for s in (computed, reused)] == [0, 8]


@pytest.mark.parametrize(("eviction", "left"), [(KVEviction.LFU, [12, 16]), (KVEviction.COST, [16, 12])])
def test_cost_keeps_what_comes_late_in_a_prompt(tokens, store, cached_length, eviction, left):
    """Of two tails that nobody used again, that from position 12 on takes longer to recompute than that from 4 on."""
    cache = KVCache(8, 4, policy=make_eviction_policy(eviction, attention_parity=8))
    late, early = tokens(16), tokens(16, 100)
    store(cache, late)
    store(cache, early)
    use(cache, late[:12])
    use(cache, early[:4])
    cache.allocate(1)
    assert [cached_length(cache, s) for s in (late, early)] == left


@pytest.mark.parametrize("eviction", KVEviction)
def test_what_has_an_owner_stays(tokens, store, cached_length, eviction):
    cache = KVCache(4, 4, policy=make_eviction_policy(eviction))
    running = cache.allocate(2)
    cache.commit(tokens(8), running, ANYONE)
    store(cache, tokens(8, 100))
    taken = cache.allocate(2)
    assert cache.allocate(1) is None
    assert [cached_length(cache, s) for s in (tokens(8), tokens(8, 100))] == [8, 0]
    cache.check_integrity([running, taken])


def test_released_leaves_become_evictable_again(tokens, store, cached_length):
    """Eviction passed over the running sequence once; when it ends, its blocks are to be had."""
    cache = KVCache(4, 4)
    running = cache.allocate(2)
    cache.commit(tokens(8), running, ANYONE)
    store(cache, tokens(8, 100))
    cache.release(cache.allocate(2))
    assert cached_length(cache, tokens(8)) == 8
    cache.release(running)
    cache.check_integrity([])
    assert cache.available() == 4
    assert cache.allocate(3).size == 3
    assert cached_length(cache, tokens(8)) == 4


def test_eviction_passes_over_owned_leaves_without_changing_their_age(tokens, store, cached_length):
    cache = KVCache(6, 4)
    oldest, older, newer = tokens(8), tokens(8, 100), tokens(8, 200)
    running = cache.allocate(2)
    cache.commit(oldest, running, ANYONE)
    store(cache, older)
    store(cache, newer)
    cache.allocate(1)
    assert [cached_length(cache, s) for s in (oldest, older, newer)] == [8, 4, 8]
    cache.release(running)
    cache.allocate(1)
    assert [cached_length(cache, s) for s in (oldest, older, newer)] == [4, 4, 8]


def test_running_branches_return_with_their_common_prefix(tokens, store, cached_length):
    cache = KVCache(6, 4)
    left, right = np.append(tokens(4), tokens(4, 100)), np.append(tokens(4), tokens(4, 200))
    first, second = cache.allocate(2), cache.allocate(1)
    cache.commit(left, first, ANYONE)
    second = np.append(cache.match(right, ANYONE, 8).blocks, second)
    cache.commit(right, second, ANYONE)
    store(cache, tokens(12, 300))
    taken = cache.allocate(3)
    cache.check_integrity([first, second, taken])
    cache.release(second)
    cache.check_integrity([first, taken])
    taken = np.append(taken, cache.allocate(1))
    assert [cached_length(cache, s) for s in (left, right)] == [8, 4]
    cache.release(first)
    cache.check_integrity([taken])
    assert cache.allocate(2).size == 2


def test_a_trimmed_leaf_gives_its_memory_back(tokens, store):
    cache = KVCache(64, 4)
    store(cache, tokens(256))
    for _ in range(60):
        cache.allocate(1)
    (leaf,) = cache._tree.nodes()
    assert leaf.tokens.size == 16
    assert leaf.tokens.base is None or leaf.tokens.base.size <= 32


@pytest.mark.parametrize("eviction", KVEviction)
def test_evictable_blocks_above_an_owned_leaf_can_be_had(tokens, store, eviction):
    """Two sequences computed the same prefix. The tree kept the first one's blocks, the second still runs."""
    cache = KVCache(6, 4, policy=make_eviction_policy(eviction))
    second = cache.allocate(3)
    store(cache, tokens(8))
    cache.commit(tokens(12), second, ANYONE)
    assert cache.available() == 3
    taken = cache.allocate(3)
    assert taken.size == 3
    cache.check_integrity([second, taken])


@pytest.mark.parametrize("eviction", KVEviction)
@pytest.mark.parametrize("count", [1, 7, 64])
def test_eviction_at_any_batch_size_gives_every_block_once(tokens, store, count, eviction):
    cache = KVCache(128, 4, policy=make_eviction_policy(eviction))
    for index in range(32):
        store(cache, np.append(tokens(index % 5 + 1), tokens(12, 100 * (index + 1))))
    taken = []
    while (blocks := cache.allocate(count)) is not None:
        taken += blocks.tolist()
        cache.check_integrity([np.array(taken, dtype=np.int32)])
    assert len(set(taken)) == len(taken) == 128 // count * count


def test_empty_namespaces_leave_nothing_behind(tokens, store):
    cache = KVCache(4, 4)
    for tenant in range(50):
        store(cache, tokens(8), (f"tenant {tenant}", ""))
    assert len(cache._tree._roots) == 2
    cache.allocate(4)
    assert not cache._tree._roots
    assert not cache._tree._policy.listed
