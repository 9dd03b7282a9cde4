"""DDR: what the tree gives up is kept, comes up again, and is given up in turn."""

from __future__ import annotations

import numpy as np
import pytest


class Cost:
    """A cost model by hand."""

    def __init__(self, prompt_s, transfer_s):
        self.prompt_s, self.transfer_s = prompt_s, transfer_s
        self.asked = []

    def prompt_seconds(self, start, end):
        self.asked.append((start, end))
        return self.prompt_s

    def transfer_seconds(self, num_bytes, path):
        self.asked.append((num_bytes, path))
        return self.transfer_s


def test_what_is_evicted_comes_up_again(bed, run):
    b = bed(blocks=8)
    b.compute(run(1, 24))
    b.compute(run(2, 20))  # takes the room of five blocks, of which two were free
    assert b.cached(run(1, 24)) == 12
    assert b.tiers.stats().ddr_blocks == 3
    assert b.fetch(run(1, 24)) == 24
    stats = b.tiers.stats()
    assert (stats.ddr_hit_tokens, stats.bytes_ddr_to_hbm, stats.fetches) == (12, 3 * 32, 1)


def test_a_block_that_is_saved_already_is_not_copied_again(bed, run):
    b = bed(blocks=8)
    for _ in range(3):
        b.compute(run(1, 32))
        b.compute(run(2, 32))
    assert b.tiers.stats().bytes_hbm_to_ddr == 16 * 32
    assert b.tiers.stats().ddr_blocks == 16


def test_the_coldest_is_dropped_when_ddr_is_full(bed, run):
    b = bed(blocks=4, host_blocks=8)
    for name in (1, 2, 3):
        b.compute(run(name, 16))
    assert b.fetch(run(1, 16)) == 8, "brings up half of the pool at once"
    b.compute(run(4, 16))
    b.compute(run(5, 16))
    assert b.fetch(run(2, 16)) == 0, "was colder than what was fetched"
    assert b.fetch(run(1, 16)) == 8
    assert b.tiers.stats().lost_blocks > 0


def test_only_whole_blocks_and_only_behind_what_the_tree_has(bed, run):
    b = bed(blocks=8)
    b.compute(run(1, 30))
    b.compute(run(2, 32))
    assert b.tiers.stats().ddr_blocks == 7, "the last two tokens fill no block"
    branch = np.append(run(1, 14), run(9, 10))
    assert b.fetch(branch) == 12
    assert b.cached(run(1, 30)) == 12


def test_tenants_do_not_share(bed, run):
    b = bed(blocks=8)
    b.compute(run(1, 32), ("ann", "x"))
    b.compute(run(2, 32), ("bob", "x"))
    for other in (("bob", "x"), ("ann", ""), ("", "annx"), ("annx", "")):
        assert b.fetch(run(1, 32), other) == 0
    assert b.fetch(run(1, 32), ("ann", "x")) == 16


def test_a_hit_compares_tokens(bed, run, monkeypatch):
    """Also where two blocks had the same hash."""
    from sageLLM.kv_runtime.tiers import block_key

    monkeypatch.setattr(block_key, "chain_hashes", lambda parent, tokens, size: [bytes(16)] * (tokens.size // size))
    b = bed(blocks=2)
    b.compute(run(1, 4))
    b.compute(run(2, 8))
    assert b.fetch(run(3, 4)) == 0
    assert b.fetch(run(1, 4)) == 4


def test_several_prompts_that_share_a_prefix_wait_for_one_fetch(bed, run):
    b = bed(blocks=16)
    b.compute(run(1, 24))
    b.compute(run(2, 64))
    wishes = [b.wish(np.append(run(1, 24), run(name, 8))) for name in (7, 8, 9)]
    fetcher = b.tiers.fetcher
    assert [fetcher.is_coming(wish) for wish in wishes] == [True] * 3
    assert (len(b.jobs), b.tiers.stats().fetching_blocks) == (1, 6)
    b.work()
    assert [fetcher.is_coming(wish) for wish in wishes] == [False] * 3
    assert b.cached(run(1, 24)) == 24


def test_two_threads_that_ask_at_once_start_one_fetch(bed, run, monkeypatch):
    b = bed()
    b.compute(run(1, 32))
    b.compute(run(2, 32))
    b.kv.release(b.kv.allocate(8))
    b.tiers.flush()
    one, other = b.wish(run(1, 12)), b.wish(run(1, 16))
    fetcher, is_worth_it = b.tiers.fetcher, b.tiers.fetcher._is_worth_it

    def meanwhile(*arguments):
        monkeypatch.setattr(fetcher, "_is_worth_it", is_worth_it)
        assert fetcher.is_coming(other)
        return is_worth_it(*arguments)

    monkeypatch.setattr(fetcher, "_is_worth_it", meanwhile)
    assert fetcher.is_coming(one)
    assert one.run is other.run
    assert fetcher.num_coming == b.kv.num_blocks - b.kv.available() == 4
    b.work()
    assert b.cached(run(1, 16)) == 16


def test_where_every_hit_is_brought_up_one_waits_for_the_other(bed, run):
    b = bed()
    for name in (1, 2):
        b.compute(run(name, 16))
    b.kv.release(b.kv.allocate(8))
    b.tiers.flush()
    one, other = b.wish(run(1, 16)), b.wish(run(2, 16))
    assert b.tiers.fetcher.is_coming(one)
    assert b.tiers.fetcher.is_coming(other), "half of the pool is on its way already"
    b.work()
    assert b.tiers.fetcher.is_coming(other)
    b.work()
    assert [b.cached(run(name, 16)) for name in (1, 2)] == [16, 16]


def test_what_is_faster_to_compute_is_not_fetched(bed, run):
    cost = Cost(prompt_s=1.0, transfer_s=2.0)
    b = bed(blocks=8, cost=cost)
    b.compute(run(1, 32))
    b.compute(run(2, 20))
    assert b.fetch(run(1, 32)) == 12
    assert cost.asked == [(12, 32), (5 * 32, "ddr")]
    cost.transfer_s = 0.5
    assert b.fetch(run(1, 32)) > 12


def test_after_its_deadline_nobody_waits_and_nothing_is_copied(bed, run):
    b = bed(blocks=8, cost=Cost(prompt_s=3.0, transfer_s=1.0))
    b.now = 100.0
    b.compute(run(1, 32))
    b.compute(run(2, 32))
    wish = b.wish(run(1, 32))
    assert b.tiers.fetcher.is_coming(wish)
    assert wish.deadline == 102.0
    b.now = 102.5
    assert not b.tiers.fetcher.is_coming(wish)
    b.work()
    assert b.cached(run(1, 32)) == 0


def test_without_room_it_is_asked_again_later(bed, run):
    b = bed(blocks=8)
    b.compute(run(1, 16))
    b.compute(run(2, 32))
    held = b.kv.allocate(8)
    wish = b.wish(run(1, 16))
    assert not b.tiers.fetcher.is_coming(wish)
    b.kv.release(held)
    assert b.tiers.fetcher.is_coming(wish)
    b.work()
    assert b.cached(run(1, 16)) == 16


@pytest.mark.parametrize("what", ["write", "fence"])
def test_a_copy_up_that_fails_is_a_miss(bed, run, what, caplog):
    b = bed(blocks=8)
    b.compute(run(1, 16))
    b.compute(run(2, 32))
    b.io.fail = what
    assert b.fetch(run(1, 16)) == 0
    assert b.tiers.stats().fetch_failures == 4
    assert "could not be brought up" in caplog.text
    assert b.fetch(run(1, 16)) == 16, "it is still there"


def test_a_copy_down_that_fails_is_forgotten(bed, run, caplog):
    b = bed(blocks=8)
    b.compute(run(1, 16))
    b.io.fail = "read"
    b.compute(run(2, 32))
    assert "4 KV blocks could not be saved" in caplog.text
    assert b.tiers.stats().ddr_blocks == 0
    assert b.fetch(run(1, 16)) == 0
    assert b.tiers.stats().lost_blocks == 4


def test_what_is_asked_for_before_it_is_saved(bed, run):
    """Given up, and wished for before any step has come by: the copier saves it first."""
    b = bed(blocks=8)
    b.compute(run(1, 16))
    b.compute(run(2, 16))
    b.kv.release(b.kv.allocate(5))
    assert b.cached(run(1, 16)) == 0
    assert b.fetch(run(1, 16)) == 16


def test_saved_blocks_stay_until_they_are_released(bed, run):
    b = bed(blocks=8, host_blocks=8)
    tokens = run(1, 18)
    blocks = b.kv.allocate(5)
    for index in range(4):
        b.io.pool[blocks[index]] = b.content(tokens[: 4 * index + 4])
    kept = b.tiers.save(tokens, blocks, ("", ""))
    b.kv.release(blocks)
    assert len(kept) == 4
    for name in (2, 3, 4):
        b.compute(run(name, 32))
    assert b.fetch(tokens) == 16
    b.tiers.release(kept)
