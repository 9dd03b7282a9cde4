"""Sequences that need the whole pool: whatever else holds blocks meanwhile, each of them gets its turn."""

from __future__ import annotations

import random

import pytest

from sageLLM.errors import RequestError


def test_a_prompt_that_fills_the_pool_is_granted_though_its_cached_prefix_ends_inside_a_block(bench):
    b = bench(blocks=4, block_size=4)
    b.offer(b.sequence([1, 2, 3, 4, 5], 1))
    b.run()
    b.offer(b.sequence([1, 2, 3, 4, 5, *range(20, 29)], 2))  # 14 + 2 tokens are all 4 blocks
    second = b.run(limit=200)[-1]
    assert second.prefix_hit_tokens == 4  # not 5: there is no block to copy the fifth token's into
    b.check_nothing_leaks()


def test_a_preempted_prompt_of_several_choices_leaves_nothing_that_another_sequence_needs(bench):
    b = bench(blocks=10, block_size=4, max_step_tokens=2)
    large, several = b.sequence([1, 2, 3, 4, 5], 35), b.sequence(range(50, 63), 2, n=4)
    b.offer(large, several)  # the first grows to 10 blocks; the second has 4 and 3 for its further choices
    b.run(limit=500)
    assert b.worker.preemptions
    assert [len(c.output_tokens) for s in (large, several) for c in s.choices] == [35, 2, 2, 2, 2]
    b.check_nothing_leaks()


def test_blocks_that_come_back_just_before_a_row_alone_would_fail_are_taken(bench, null_tokens):
    b = bench(blocks=4, block_size=4)
    elsewhere = [b.kv.allocate(2)]

    def in_transit():  # asked after no block could be had: another thread takes a lease back at this moment
        while elsewhere:
            b.kv.release(elsewhere.pop())
        return False

    b.worker.blocks._leases_in_transit = in_transit
    alone = b.sequence([1] * 6, 9)
    b.offer(alone)
    b.run(limit=100)
    assert alone.choices[0].output_tokens == null_tokens(6, 9)
    b.check_nothing_leaks()


def test_who_waits_behind_a_preempted_row_is_let_in_when_that_goes_on(bench):
    b = bench(blocks=8, block_size=4)
    short, long, behind = b.sequence([1] * 4, 16), b.sequence([2] * 4, 28), b.sequence([3] * 4, 2)
    b.offer(short, long)

    def offer_when_preempted():
        if b.worker.preemptions and not b.finished and not len(b.waiting):
            b.offer(behind)

    b.run(limit=500, between=offer_when_preempted)
    assert b.finished == [short, behind, long]
    b.check_nothing_leaks()


@pytest.mark.parametrize("part", range(4))
def test_random_mixes_that_fill_small_pools_all_end(bench, part):
    for seed in range(part * 100, part * 100 + 100):
        chosen = random.Random(seed)
        b = bench(
            blocks=chosen.randint(4, 12),
            block_size=4,
            max_step_tokens=chosen.randint(1, 12),
            max_batch_size=(slots := chosen.randint(2, 8)),
            max_prefill_batch=min(slots, chosen.randint(1, 4)),
            launch_ahead=chosen.random() < 0.7,
        )
        accepted = []
        for _ in range(chosen.randint(1, 6)):
            length = chosen.randint(1, 20)
            shared = chosen.randint(0, length)
            prompt = [*range(1, shared + 1), *(chosen.randint(1, 5) for _ in range(length - shared))]
            sequence = b.sequence(prompt, chosen.randint(1, 24), n=chosen.choice([1, 1, 1, 2, 3]))
            try:
                b.offer(sequence)
            except RequestError:
                continue
            accepted.append(sequence)
        b.run(limit=1500)
        assert len(b.finished) == len(accepted), f"seed {seed}"
        b.check_nothing_leaks()


def test_without_kv_commit_nobody_waits_longer_than_until_the_prompt_is_computed(bench):
    b = bench(commit=False)
    b.offer(*(b.sequence([*range(12), 50 + i], 20) for i in range(3)))
    woken_with = []
    b.worker.on_leases_returned = lambda: woken_with.append(b.worker.num_running)
    b.worker.submit_prefill(b.waiting.take_granted())
    for _ in range(6):
        b.worker.step()
    assert woken_with == [1]  # while the first one still runs
    assert len(b.waiting.take_granted()) == 1
