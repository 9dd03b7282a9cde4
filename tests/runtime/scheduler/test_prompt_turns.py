"""Turns: tenants share the steps' room for prompts by weight, whatever their lengths, and that for decoding rows."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sageLLM.runtime.scheduler.prompt_turns import DecodeTurns, PromptTurns


def steps_had(turns, prompts, steps):
    """Steps that each tenant gets when each step computes the first in order, to its end or a whole step of it."""
    had = dict.fromkeys(prompts, 0.0)
    for _ in range(steps):
        tenants = [tenant for tenant, shares in prompts.items() for _ in shares]
        shares = [share for shares in prompts.values() for share in shares]
        (first,) = turns.order(tenants, shares, 1)
        turns.take(tenants[first], shares[first])
        had[tenants[first]] += shares[first]
    return had


@given(a=st.floats(0.05, 1.0), b=st.floats(0.05, 1.0), weight=st.sampled_from([0.5, 1.0, 3.0]))
def test_tenants_share_steps_by_weight_however_long_their_prompts_are(a, b, weight):
    had = steps_had(PromptTurns({"gold": weight}), {"gold": [a] * 3, "plain": [b] * 50}, 300)
    assert abs(had["gold"] / weight - had["plain"]) <= 2 * max(a, b) / min(1.0, weight)


def test_prompts_of_a_tenant_stay_in_order_and_the_limit_is_in_rows():
    turns = PromptTurns({})
    assert turns.order(["noisy", "noisy", "noisy", "quiet"], [0.5] * 4, 3) == [0, 3, 1]
    assert turns.order(["noisy", "noisy"], [0.5] * 2, 8) == [0, 1]


def test_absence_earns_no_credit():
    turns = PromptTurns({})
    steps_had(turns, {"busy": [1.0]}, 100)
    had = steps_had(turns, {"busy": [1.0], "back": [1.0]}, 10)
    assert had == {"busy": pytest.approx(5), "back": pytest.approx(5)}


def test_who_is_gone_is_forgotten():
    turns = PromptTurns({})
    for n in range(1000):
        steps_had(turns, {f"visitor {n}": [0.5], "steady": [0.5]}, 3)
    assert len(turns._had) < 10


def rows_had(turns, rows, limit, steps):
    """Tokens that each tenant gets in all when so many of its rows decode, and a step has room for `limit`."""
    had = Counter()
    for _ in range(steps):
        tenants = [*Counter(rows).elements()]
        chosen = Counter(tenants[place] for place in turns.order(tenants, [1.0] * len(tenants), limit))
        had += chosen
        turns.serve(chosen, Counter(rows) - chosen)
    return had


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_rows_of_tenants_share_steps_by_weight_however_many_they_are(weight):
    had = rows_had(DecodeTurns({"gold": weight}), {"plain": 20, "gold": 4}, 4, 300)
    assert abs(had["gold"] - 1200 * weight / (1 + weight)) <= 4


def test_few_rows_get_all_they_can_use_and_earn_no_credit_by_it():
    turns = DecodeTurns({})
    assert rows_had(turns, {"many": 20, "one": 1}, 4, 100) == {"many": 300, "one": 100}
    had = rows_had(turns, {"many": 20, "one": 20}, 4, 10)
    assert abs(had["many"] - had["one"]) <= 4
