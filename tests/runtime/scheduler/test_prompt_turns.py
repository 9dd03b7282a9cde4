"""Prompt turns: tenants share the steps' room for prompts by weight, whatever the lengths of their prompts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sageLLM.runtime.scheduler.prompt_turns import PromptTurns


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
