"""KVEventLog: whoever reads its events knows which blocks are cached, by hashes that anybody can compute."""

from __future__ import annotations

import numpy as np
import pytest

from sageLLM.kv_runtime import KVCache, KVEventLog, KVEviction, block_hashes, make_eviction_policy

ANYONE = ("", "")


@pytest.fixture
def logged():
    def make(num_blocks=8, max_blocks=1000, **options):
        cache = KVCache(num_blocks, 4, **options)
        log = KVEventLog(num_blocks, 4, max_blocks)
        cache.listen(log)
        return cache, log

    return make


def told(log):
    return [(event.kind.value, event.start, event.num_blocks) for event in log.take()]


def test_full_blocks_are_stored_and_removed(logged, tokens, store):
    cache, log = logged()
    store(cache, tokens(10))
    store(cache, tokens(12))
    cache.allocate(6)
    cache.allocate(2)
    assert told(log) == [("stored", 0, 2), ("stored", 8, 1), ("removed", 8, 1), ("removed", 0, 2)]


def test_what_is_stored_says_which_tokens_and_after_which_block(logged, tokens, store):
    cache, log = logged()
    store(cache, tokens(10), ("ann", "salt"))
    branch = np.append(tokens(6), tokens(6, 100))
    store(cache, branch, ("ann", "salt"))
    first, second = log.take()
    hashes, others = (block_hashes(prompt, 4, "ann", "salt") for prompt in (tokens(10), branch))
    assert first.parent_hash is None
    assert first.block_hashes == hashes
    assert first.tokens.tolist() == [*range(8)]
    assert (second.start, second.parent_hash, second.block_hashes) == (4, others[0], others[1:])
    assert others[0] == hashes[0]
    assert second.tokens.tolist() == [4, 5, *range(100, 106)]
    assert {(event.tenant, event.block_size, event.tier) for event in (first, second)} == {("ann", 4, "hbm")}


def test_hashes_differ_by_everything_before_and_by_who_may_share(tokens):
    same = [block_hashes(prompt, 4)[1] for prompt in (tokens(8), np.append(tokens(4, 1), tokens(4, 4)))]
    spaces = [block_hashes(tokens(4), 4, *space)[0] for space in (("a", ""), ("", "a"), ("", ""), ("a", "a"))]
    assert len({*same, *spaces}) == 6
    assert block_hashes(tokens(4).tolist(), 4) == block_hashes(tokens(7), 4)


def test_a_listener_that_comes_late_hears_first_what_is_there(tokens, store):
    cache = KVCache(8, 4)
    store(cache, tokens(12))
    store(cache, np.append(tokens(6), tokens(6, 100)))
    log = KVEventLog(8, 4, 1000)
    cache.listen(log)
    stored = {name for event in log.take() for name in event.block_hashes}
    assert stored == {*block_hashes(tokens(12), 4), *block_hashes(np.append(tokens(6), tokens(6, 100)), 4)}


def test_what_nobody_reads_in_time_is_lost_oldest_first_and_counted(logged, tokens, store):
    cache, log = logged(max_blocks=3)
    for n in range(4):
        store(cache, tokens(4, 10 * n))
    store(cache, tokens(8, 100))
    lost, *others = log.take()
    assert (lost.kind, lost.lost, lost.seq) == ("lost", 3, 2)
    assert [(event.kind, event.seq, event.num_blocks) for event in others] == [("stored", 3, 1), ("stored", 4, 2)]
    assert log.lost == 3
    cache.clear()
    assert told(log) == [("cleared", 0, 0)]


def test_an_event_that_is_too_large_for_the_log_is_lost_alone(logged, tokens, store):
    cache, log = logged(max_blocks=2)
    store(cache, tokens(12))
    assert told(log) == [("lost", 0, 0)]
    store(cache, tokens(4, 50))
    assert told(log) == [("stored", 0, 1)]


@pytest.mark.parametrize("eviction", KVEviction)
def test_events_tell_what_is_cached(logged, eviction):
    rng = np.random.default_rng(7)
    now = [0.0]
    cache, log = logged(24, policy=make_eviction_policy(eviction), ttl_s=60, clock=lambda: now[0])
    cached, kinds = set(), set()
    for _ in range(400):
        now[0] += 1
        namespace = ("", "ab"[int(rng.integers(2))])
        prompt = rng.integers(0, 2, int(rng.integers(1, 30))).astype(np.int32)
        found = cache.match(prompt, namespace, prompt.size)
        for event in log.take():
            kinds.add(event.kind.value)
            names = set(event.block_hashes)
            if event.kind == "stored":
                assert not names & cached
                cached |= names
            elif event.kind == "removed":
                assert names <= cached
                cached -= names
            else:
                cached.clear()
        known = [name in cached for name in block_hashes(prompt, 4, *namespace)]
        assert known == [True] * (found.tokens // 4) + [False] * (prompt.size // 4 - found.tokens // 4)
        whole = found.tokens // 4
        fresh = cache.allocate(-(-prompt.size // 4) - whole)
        cache.release(found.blocks[whole:])
        blocks = np.append(found.blocks[:whole], fresh).astype(np.int32)
        cache.commit(prompt, blocks, namespace)
        cache.release(blocks)
        if rng.random() < 0.01:
            cache.clear()
    assert kinds == {"stored", "removed", "cleared"}
