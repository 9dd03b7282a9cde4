"""When KV blocks run out the policy says who gives way, and who comes back first."""

from __future__ import annotations

import pytest

from .test_planner import recorded  # noqa: F401 - a fixture


def two_that_do_not_fit(b, tenants=("", "")):
    """Each grows to 5 blocks of the 6, so one of them is preempted; they arrive in this order."""
    return [b.sequence([n] * 8, max_new_tokens=12, tenant=tenant) for n, tenant in enumerate(tenants, start=1)]


def lost_their_blocks(plans) -> list[int]:
    """First tokens of the prompts that were computed again, with what had been said."""
    return [int(chunk.tokens[0]) for plan in plans for chunk in plan.chunks if len(chunk.tokens) > 8]


@pytest.mark.parametrize("policy", ["fcfs", "longest_prefix", "shortest_job"])
def test_the_newest_gives_way(recorded, policy):  # noqa: F811
    b, plans = recorded(blocks=6, block_size=4, policy=policy)
    old, new = two_that_do_not_fit(b)
    b.offer(old, new)
    assert b.run() == [old, new]
    assert lost_their_blocks(plans) == [2]
    b.check_nothing_leaks()


@pytest.mark.parametrize(
    ("policy", "field", "last", "first"),
    [("priority", "priority", -1, 0), ("deadline", "deadline_ms", None, 1e6), ("deadline", "deadline_ms", 9e9, 1e6)],
)
def test_the_lowest_priority_and_the_latest_deadline_give_way_though_they_are_older(
    recorded, policy, field, last, first  # noqa: F811
):  # fmt: skip
    b, plans = recorded(blocks=6, block_size=4, policy=policy)
    old, new = two_that_do_not_fit(b)
    setattr(old.request, field, last)
    setattr(new.request, field, first)
    for sequence in (old, new):
        b.offer(sequence)
        b.worker.submit_prefill(b.waiting.take_granted())
    assert b.run() == [new, old]
    assert lost_their_blocks(plans) == [1]
    b.check_nothing_leaks()


def test_a_row_that_ends_while_it_is_swapped_out_leaves_nothing(recorded):  # noqa: F811
    b, _ = recorded(blocks=6, block_size=4, tiers={"host_blocks": 8}, swap=True)
    old, new = two_that_do_not_fit(b)
    b.offer(old, new)
    b.worker.submit_prefill(b.waiting.take_granted())
    while not b.worker.preemptions:
        b.worker.step()
    assert b.worker.blocks.swap._kept
    b.worker.cancel([new.request])
    assert b.run() == [new, old]
    assert not b.worker.blocks.swap._kept
    b.check_nothing_leaks()


def test_what_was_swapped_out_is_not_computed_again(recorded):  # noqa: F811
    b, plans = recorded(blocks=6, block_size=4, tiers={"host_blocks": 8}, swap=True)
    old, new = two_that_do_not_fit(b)
    b.offer(old, new)
    assert b.run() == [old, new]
    assert b.worker.preemptions == 1
    assert lost_their_blocks(plans) == []
    assert max(len(chunk.tokens) for plan in plans for chunk in plan.chunks if chunk.start) <= 5
    b.check_nothing_leaks()


def test_the_tenant_that_has_most_gives_way(recorded):  # noqa: F811
    b, plans = recorded(blocks=12, block_size=4, policy="fair_share", commit=False)
    sequences = [b.sequence([n] * 8, 12, tenant=t) for n, t in enumerate(("heavy", "heavy", "light"), start=1)]
    for sequence in sequences:
        b.offer(sequence)
        b.worker.submit_prefill(b.waiting.take_granted())
    assert b.run() == [sequences[0], sequences[2], sequences[1]]
    assert lost_their_blocks(plans) == [2]
    b.check_nothing_leaks()


def test_the_preempted_come_back_in_turn_and_before_whoever_waits(recorded):  # noqa: F811
    b, _ = recorded(blocks=12, block_size=4, policy="priority")
    low, middle, high, urgent = (b.sequence([n] * 8, 24) for n in range(1, 5))
    for sequence, priority in ((low, 1), (middle, 2), (high, 3), (urgent, 9)):
        sequence.request.priority = priority
    b.offer(low, middle, high)
    b.worker.submit_prefill(b.waiting.take_granted())
    while b.worker.preemptions < 2:
        b.worker.step()
        assert not b.finished
    b.offer(urgent)
    while urgent.timings.scheduled is None:
        b.worker.step()
        b.worker.submit_prefill(b.waiting.take_granted())
    assert not b.worker.blocks.has_preempted
    assert b.run() == [high, middle, urgent, low]
    b.check_nothing_leaks()


def test_of_the_prompts_on_the_worker_the_first_by_rank_is_computed_first(recorded):  # noqa: F811
    b, plans = recorded(max_step_tokens=4, policy="priority")
    low, high = b.sequence([1] * 8, max_new_tokens=1), b.sequence([2] * 8, max_new_tokens=1)
    high.request.priority = 1
    for sequence in (low, high):
        b.offer(sequence)
        b.worker.submit_prefill(b.waiting.take_granted())
    b.run()
    assert [int(chunk.tokens[0]) for plan in plans for chunk in plan.chunks] == [2, 2, 1, 1]
