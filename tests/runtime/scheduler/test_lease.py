"""Leases: slots and blocks for a whole prompt, shared prefixes, and what is returned when."""

from __future__ import annotations

import pytest

from sageLLM.errors import RequestError
from sageLLM.kv_runtime.tiers import fetch


def test_a_lease_has_a_slot_per_choice_and_blocks_for_the_prompt(bench):
    b = bench(block_size=4)
    lease = b.grant(b.sequence(range(10), n=3))
    assert len(lease.slots) == 3
    assert len(lease.blocks) == 3
    assert len(lease.fork_blocks) == 2  # the third block is partly filled: each further choice needs its own
    assert b.leases.free_slots == 5


def test_a_prompt_of_whole_blocks_needs_no_fork_blocks(bench):
    b = bench(block_size=5)
    assert len(b.grant(b.sequence(range(10), n=3)).fork_blocks) == 0


def test_no_lease_without_blocks_and_nothing_is_taken(bench):
    b = bench(blocks=4)
    b.grant(b.sequence(range(12)))
    assert b.grant(b.sequence(range(20, 30))) is None
    assert b.leases.free_slots == 7
    assert b.kv.num_free == 1


def test_no_lease_while_preempted_rows_wait(bench):
    b = bench()
    b.leases.paused = True
    assert b.grant(b.sequence(range(5))) is None


def test_a_hit_shares_whole_blocks_and_copies_the_one_it_ends_in(bench):
    b = bench(block_size=4)
    b.offer(b.sequence(range(10)))
    b.run()
    lease = b.grant(b.sequence([*range(10), 77, 78]))
    assert lease.hit_tokens == 10
    assert lease.copy.target == lease.blocks[2]
    assert lease.copy.source != lease.blocks[2]


def test_at_least_one_token_is_always_computed(bench):
    b = bench(block_size=4)
    b.offer(b.sequence(range(8)))
    b.run()
    assert b.grant(b.sequence(range(8))).hit_tokens == 7


def test_prompt_logprobs_need_every_position_so_nothing_is_reused(bench):
    b = bench(block_size=4)
    b.offer(b.sequence(range(8)))
    b.run()
    assert b.grant(b.sequence(range(8), prompt_logprobs=1)).hit_tokens == 0


def test_without_kv_lookup_nothing_is_reused(bench):
    b = bench(block_size=4)
    b.offer(b.sequence(range(8)))
    b.run()
    sequence = b.sequence(range(8))
    sequence.kv = None
    assert b.grant(sequence).hit_tokens == 0


def test_more_choices_than_slots_is_refused(bench):
    b = bench(max_batch_size=2)
    with pytest.raises(RequestError, match="n=3 is more than scheduler.max_batch_size=2"):
        b.leases.check_fits(b.sequence(range(4), n=3))


def test_a_lease_that_was_never_used_goes_back_whole(bench):
    b = bench(block_size=4)
    b.offer(b.sequence(range(10)))
    b.run()
    sequence = b.sequence([*range(10), *range(50, 70)], n=2)
    assert b.grant(sequence) is not None
    assert b.leases.reclaim(sequence.request)
    assert not b.leases.reclaim(sequence.request)
    b.check_nothing_leaks()


def test_waiting_sequences_keep_their_order_behind_a_prefix(bench):
    b = bench(block_size=4, max_batch_size=8)
    shared = list(range(16))
    first, second, other = b.sequence([*shared, 90, 91]), b.sequence([*shared, 92]), b.sequence(range(50, 60))
    b.offer(first, second, other)
    assert b.waiting.take_granted() == [first, other]  # second waits for the prefix that first computes
    b.leases.prefix_computed(first, first.kv)
    assert b.waiting.take_granted() == [second]


def test_blocks_on_their_way_into_a_lease_or_out_of_it_count_as_in_transit(bench, monkeypatch):
    b = bench(block_size=4)
    seen = []
    acquire, release = b.kv.acquire, b.kv.release
    monkeypatch.setattr(b.kv, "acquire", lambda wants: (acquire(wants), seen.append(b.leases.any_in_transit))[0])
    monkeypatch.setattr(b.kv, "release", lambda blocks: (seen.append(b.leases.any_in_transit), release(blocks))[1])
    sequence = b.sequence(range(10))
    b.grant(sequence)
    assert b.leases.reclaim(sequence.request)
    assert seen
    assert all(seen)  # else the worker, seeing too few blocks and nobody who has them, would give up
    b.check_nothing_leaks()


def test_a_prompt_is_hashed_once_however_many_workers_could_fetch_it(bench, monkeypatch):
    b = bench(mode="strict", prefill_workers=3, tiers={"host_blocks": 4})
    hashed, prefix_keys = [], fetch.prefix_keys
    monkeypatch.setattr(fetch, "prefix_keys", lambda *prompt: hashed.append(prompt) or prefix_keys(*prompt))
    for held, best in (((0, 0, 0), 0), ((1, 2, 2), 1), ((0, 0, 1), 2)):
        for tiers, count in zip(b.tiers, held, strict=True):
            tiers.fetcher.count_held = lambda wish, count=count: count
        hashed.clear()
        sequence = b.sequence(range(9))
        b.leases.look_below(sequence)
        assert sequence.kv.fetcher is b.tiers[best].fetcher
        assert len(hashed) == 1


def test_a_copy_shows_from_when_it_holds_blocks(bench, monkeypatch):
    b = bench(mode="strict", tiers={"host_blocks": 4}, swap=True)
    prefill, decode = b.books
    source, target, seen = prefill.kv.allocate(2), decode.kv.allocate(2), []
    monkeypatch.setattr(decode.tiers, "flush", lambda wait: seen.append(decode.any_in_transit))
    end = decode.begin_copy(prefill.kv, source, target)
    assert seen == [True]
    end()
    assert not decode.any_in_transit
