"""Prompt chunks beside decoding rows: the largest that keep the step in time, and never none for ever."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.config import SchedulerConfig
from sageLLM.errors import ConfigError
from sageLLM.runtime.scheduler.slo import PATIENCE, ChunkBudget, make_chunk_budget
from sageLLM.runtime.worker.executor import NullExecutor

BLOCK = 4


class Linear:
    """A millisecond for each token and each hundred tokens of context."""

    def step_seconds(self, decode_contexts, chunk_starts, chunk_lengths, logit_rows=0):
        tokens = len(decode_contexts) + sum(chunk_lengths)
        seen = sum(decode_contexts) + sum(chunk_starts)
        return 1e-3 * (tokens + seen / 100)


def arrays(*columns):
    return [np.array(column, np.int64) for column in columns]


def taken(budget, starts, lengths):
    """What a planner makes of a budget."""
    chunks = []
    for start, length in zip(starts, lengths, strict=True):
        if budget > 0:
            chunks.append((start, min(length, budget)))
            budget -= length
    return chunks


@settings(max_examples=200, deadline=None)
@given(
    contexts=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    prompts=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60)), min_size=1, max_size=4),
    slo_ms=st.integers(1, 80),
    most=st.integers(1, 100),
)
def test_it_is_the_largest_that_keeps_the_step_in_time(contexts, prompts, slo_ms, most):
    cost, (starts, lengths) = Linear(), zip(*prompts, strict=True)
    found = ChunkBudget(cost, slo_ms / 1000, BLOCK).mixed(*arrays(contexts, starts, lengths), most)

    def seconds(tokens):
        chunks = taken(tokens, starts, lengths)
        return cost.step_seconds(contexts, [start for start, _ in chunks], [length for _, length in chunks])

    most = min(most, sum(lengths))
    assert 0 <= found <= most
    assert found % BLOCK == 0 or found == most
    if found:
        assert seconds(found) <= slo_ms / 1000
    larger = min(most, (found // BLOCK + 1) * BLOCK)
    assert found == most or seconds(larger) > slo_ms / 1000


def test_a_prompt_is_not_denied_for_ever():
    budget = ChunkBudget(Linear(), 0.01, BLOCK)
    work = arrays([100] * 20, [0], [50])
    found = [budget.mixed(*work, most=64) for _ in range(3 * PATIENCE)]
    assert found == ([0] * (PATIENCE - 1) + [BLOCK]) * 3
    assert budget.mixed(*arrays([100] * 20, [0], [3]), most=64) == 0, "the count starts again"


def test_a_turn_of_prompts_has_what_the_decoding_steps_leave():
    budget = ChunkBudget(Linear(), 0.02, BLOCK)
    work = arrays([100] * 5, [0], [500])  # a step of these rows takes 10 ms
    assert budget.alternating(*work, most=200, decode_steps=4) == 40
    assert budget.alternating(*work, most=200, decode_steps=1) == 8
    assert budget.alternating(*work, most=24, decode_steps=4) == 24


def test_the_pace_follows_the_measured_steps(recorded):
    b, plans = recorded(step_cost=Linear(), tpot_slo_ms=1000)
    b.offer(b.sequence(range(20), max_new_tokens=9))
    b.run()
    budget = ChunkBudget(Linear(), 0.05, BLOCK)
    work = arrays([100], [0], [500])
    before = budget.mixed(*work, most=64)
    for _ in range(100):
        for plan in plans:
            contexts, chunks = plan.decode_positions + 1, plan.chunks
            took = Linear().step_seconds(contexts, [c.start for c in chunks], [len(c.tokens) for c in chunks])
            budget.observe(plan, 2 * took)
    assert budget.pace == pytest.approx(2)
    assert budget.mixed(*work, most=64) < before / 1.9
    budget.observe(plans[0], 1e9)
    assert budget.pace < 2.5, "one step alone says little"


def test_an_slo_without_costs_is_refused():
    assert make_chunk_budget(SchedulerConfig(), None, BLOCK) is None
    with pytest.raises(ConfigError, match="tpot_slo_ms"):
        make_chunk_budget(SchedulerConfig(tpot_slo_ms=5), None, BLOCK)
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="tpot_slo_ms"):
            SchedulerConfig(tpot_slo_ms=wrong)


# -- the planner -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(bench, recorder_of):
    def make(**options):
        recorder = recorder_of(NullExecutor(8))
        time_stands_still = count(step=0).__next__
        b = bench(executor=recorder, launch_ahead=False, clock=lambda: float(time_stands_still()), **options)
        for worker in b.worker.workers:
            if worker._chunk_budget is not None:
                worker._chunk_budget.observe = lambda plan, seconds: None
        return b, recorder.plans

    return make


def step_ms(plan):
    contexts, starts = plan.decode_positions + 1, [chunk.start for chunk in plan.chunks]
    return 1e3 * Linear().step_seconds(contexts, starts, [len(chunk.tokens) for chunk in plan.chunks])


def start_decoding(b):
    b.offer(b.sequence([1] * 3, max_new_tokens=60))
    b.worker.submit_prefill(b.waiting.take_granted())
    for _ in range(3):
        b.worker.step()


def mixed_load(b):
    start_decoding(b)
    b.offer(b.sequence(range(100, 220), max_new_tokens=5), b.sequence(range(300, 370), max_new_tokens=5))


def test_steps_with_decoding_rows_stay_in_time_and_others_are_full(recorded):
    b, plans = recorded(step_cost=Linear(), tpot_slo_ms=13, max_step_tokens=48)
    mixed_load(b)
    b.run()
    mixed = [plan for plan in plans if len(plan.decode_slots) and plan.chunks]
    assert len(mixed) > 10
    assert all(step_ms(plan) <= 13 for plan in mixed)
    assert max(plan.num_tokens for plan in mixed) >= 9, "and hold what they can"
    b, plans = recorded(step_cost=Linear(), tpot_slo_ms=13, max_step_tokens=48)
    b.offer(b.sequence(range(100), max_new_tokens=1))
    b.run()
    assert [len(plan.chunks[0].tokens) for plan in plans] == [48, 48, 4], "nobody decodes"


def test_without_an_slo_they_would_not(recorded):
    b, plans = recorded(step_cost=Linear(), max_step_tokens=48)
    mixed_load(b)
    b.run()
    assert max(step_ms(plan) for plan in plans if len(plan.decode_slots) and plan.chunks) > 40


def test_prompts_get_on_where_the_slo_cannot_be_kept(recorded):
    b, plans = recorded(step_cost=Linear(), tpot_slo_ms=0.5, max_step_tokens=48)
    start_decoding(b)
    late = b.sequence(range(100, 120), max_new_tokens=2)
    b.offer(late)
    b.run()
    assert late.ended
    beside = [bool(plan.chunks) for plan in plans if len(plan.decode_slots)]
    assert sum(beside) == 5, "a block at a time"
    assert sum(beside[: 5 * PATIENCE + 2]) == 5


def test_time_shared_turns_keep_the_mean(recorded):
    b, plans = recorded(
        step_cost=Linear(), tpot_slo_ms=10, mode="time_share", prefill_steps=1, decode_steps=3, max_step_tokens=48
    )
    mixed_load(b)
    b.run()
    first = next(index for index, plan in enumerate(plans) if len(plan.decode_slots))
    last = max(index for index, plan in enumerate(plans) if plan.chunks)
    for index in range(first, last):
        if plans[index].chunks:
            turn = plans[index - 3 : index + 1]
            if all(len(plan.decode_slots) for plan in turn[:3]):
                assert sum(map(step_ms, turn)) <= 3 * 10 + 1, "a row's context grows meanwhile"
    assert sum(len(plan.chunks) > 0 for plan in plans) > 5
