"""Time sharing: steps are of one kind, and the kinds take turns."""

from __future__ import annotations

import pytest

from sageLLM.runtime.scheduler.time_share import StepShares, TimeShare

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


def flooded_turns(recorded, policy, prefill_steps=1, weight=1.0, **options):  # noqa: F811
    """Kinds of steps while rows of one tenant decode and another's prompts, of ten steps each, wait."""
    weights = {"tenant_weights": {"quiet": weight}} if policy == "fair_share" else {}
    b, plans = recorded(
        mode="time_share", policy=policy, prefill_steps=prefill_steps, max_step_tokens=4, commit=False, blocks=200,
        max_batch_size=8, **weights, **options,
    )  # fmt: skip
    rows = [b.sequence([n, n], max_new_tokens=60, tenant="noisy") for n in range(3)]
    b.offer(*rows, *(b.sequence([n] * 40, max_new_tokens=2, tenant="quiet") for n in range(10, 14)))
    while not all(row.ended for row in rows):
        b.worker.submit_prefill(b.waiting.take_granted())
        b.step()
    seen = kinds(plans)
    b.run()
    b.check_nothing_leaks()
    return seen[seen.index("d") :]


def test_prompts_of_a_tenant_below_its_share_end_turns_of_decoding(recorded):  # noqa: F811
    assert "pddddpddddp" in flooded_turns(recorded, "fcfs")
    assert "pdpdpdp" in flooded_turns(recorded, "fair_share")
    assert "pddpddpdd" in flooded_turns(recorded, "fair_share", weight=0.5)


@pytest.mark.parametrize("short", [12, 30])
def test_short_rows_of_one_tenant_do_not_hold_up_a_long_one_of_another(bench, short):
    """Steps decode two rows, and there are three: a third of two slots is rounded up. The short ones, which are newer,
    have the fewest outputs at all times."""
    b = bench(
        mode="time_share", policy="fair_share", max_batch_size=2, blocks=200, commit=False,
        tenant_weights={"quiet": 0.5},
    )  # fmt: skip
    b.offer(*(b.sequence([n] * 4, max_new_tokens=short, tenant="noisy") for n in range(100)))
    long, steps = b.sequence([200] * 4, max_new_tokens=60, tenant="quiet"), 0
    b.offer(long)
    while not long.ended:
        b.worker.submit_prefill(b.waiting.take_granted())
        b.step()
        steps += 1
    assert abs(steps - 90) <= 4  # two thirds of a token each


@pytest.mark.parametrize("weight", [0.5, 1.0, 100.0])
@pytest.mark.parametrize("prefill_steps", [1, 2])
def test_decoding_goes_on_between_turns_of_prompts_whoever_is_owed_them(recorded, weight, prefill_steps):  # noqa: F811
    seen = flooded_turns(recorded, "fair_share", prefill_steps, weight)
    assert max(map(len, seen.split("d"))) == prefill_steps


def test_a_limit_on_the_time_between_tokens_keeps_the_turns(recorded):  # noqa: F811
    """What prompts may have of a turn's time is counted in its steps."""
    seen = flooded_turns(recorded, "fair_share", step_cost=Instant(), tpot_slo_ms=1000)
    assert "pddddpddddp" in seen
    assert "pdp" not in seen


class Instant:
    """Steps that take no time."""

    def step_seconds(self, *work):
        return 0.0


def test_a_tenant_is_owed_a_step_when_with_it_it_has_had_no_more_than_its_share():
    shares = StepShares({"gold": 3.0})
    assert not shares.is_owed(["plain"], [0.5], ["gold"])
    shares.take("gold", 1.0)  # 1/3 of what it is worth to the others, of whom the mean is 1/4
    assert not shares.is_owed(["plain"], [0.5], ["gold"])
    assert shares.is_owed(["plain"], [0.25], ["gold"])
    shares.take("plain", 0.25)
    assert not shares.is_owed(["plain"], [0.25], ["gold"])


def test_decoding_alone_is_owed_nothing_and_earns_nothing():
    shares = StepShares({})
    for _ in range(100):
        shares.take("busy", 1.0)
        assert not shares.is_owed(["busy"], [0.1], ["busy"])
    owed = 0
    for _ in range(10):  # it comes, and starts where the other is
        if shares.is_owed(["idle", "busy"], [1.0, 1.0], ["busy"]):
            shares.take("idle", 1.0)
            owed += 1
        else:
            shares.take("busy", 1.0)
    assert owed <= 4
