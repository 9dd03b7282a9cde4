"""Time sharing: steps are of one kind, and the kinds take turns."""

from __future__ import annotations

import pytest

from sageLLM.runtime.scheduler.time_share import TimeShare

from .test_planner import recorded  # noqa: F401 - a fixture


def kinds(plans):
    return "".join("p" if plan.chunks else "d" for plan in plans)


def test_turns():
    turns = TimeShare(prefill_steps=2, decode_steps=3)
    seen = ""
    for _ in range(12):
        prefill = turns.prefill_is_next
        seen += "p" if prefill else "d"
        turns.take(prefill)
    assert seen == "ppdddppdddpp"


def test_a_kind_that_was_passed_over_is_next_as_soon_as_it_can():
    turns = TimeShare(prefill_steps=2, decode_steps=3)
    for _ in range(10):
        turns.take(prefill=False)  # there were no prompts
    assert turns.prefill_is_next
    turns.take(prefill=True)
    turns.take(prefill=False)  # its second turn came to nothing
    assert not turns.prefill_is_next


@pytest.mark.parametrize(("shares", "pattern"), [((1, 2), "pddpddp"), ((2, 1), "ppdppdp")])
def test_no_step_mixes_and_long_prompts_alternate_with_decoding(recorded, shares, pattern):  # noqa: F811
    b, plans = recorded(
        mode="time_share", prefill_steps=shares[0], decode_steps=shares[1], max_step_tokens=4, commit=False
    )
    b.offer(b.sequence([1, 2], max_new_tokens=30), b.sequence(range(10, 60), max_new_tokens=2))
    b.run()
    assert all(not (plan.chunks and len(plan.decode_slots)) for plan in plans)
    assert pattern in kinds(plans)
    assert all(plan.num_tokens <= 4 for plan in plans)
    b.check_nothing_leaks()


def test_without_prompts_it_only_decodes_and_the_other_way_round(recorded):  # noqa: F811
    b, plans = recorded(mode="time_share", max_step_tokens=4)
    b.offer(b.sequence([1, 2], max_new_tokens=9))
    b.run()
    assert kinds(plans) == "p" + "d" * 8
    b, plans = recorded(mode="time_share", max_step_tokens=4)
    b.offer(b.sequence(range(20), max_new_tokens=1))
    b.run()
    assert kinds(plans) == "ppppp"


def test_a_full_pool_lets_the_other_kind_go_on(recorded):  # noqa: F811
    b, _ = recorded(blocks=10, block_size=4, mode="time_share", decode_steps=9, max_step_tokens=3)
    sequences = [b.sequence(range(i * 10, i * 10 + 8), max_new_tokens=12) for i in range(5)]
    b.offer(*sequences)
    b.run()
    assert [len(s.choices[0].output_tokens) for s in sequences] == [12] * 5
    b.check_nothing_leaks()
