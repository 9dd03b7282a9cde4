"""The closed form equals the graph's estimate, for any step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sageLLM.accel.graph_builder import ExecutionGraphBuilder
from sageLLM.accel.step_cost import StepCost

fixtures = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fixtures
@given(
    contexts=st.lists(st.integers(1, 3000), max_size=40),
    chunks=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 300)), max_size=4),
    data=st.data(),
)
def test_it_is_what_the_hybrid_graph_estimates(shape, rates, contexts, chunks, data):
    logits = data.draw(st.none() | st.integers(len(contexts), len(contexts) + len(chunks)), label="logit rows")
    cost, builder = StepCost(shape, rates), ExecutionGraphBuilder(shape)
    starts, lengths = [start for start, _ in chunks], [length for _, length in chunks]
    told = cost.step_seconds(np.array(contexts, np.int64), np.array(starts, np.int64), np.array(lengths), logits)
    graph = builder.build_hybrid_graph(contexts, chunks, logits)
    assert told == pytest.approx(graph.estimate_total_time(rates) + (rates.step_s if len(graph) else 0))


@fixtures
@given(rows=st.integers(1, 300), first=st.integers(1, 200_000), each=st.integers(1, 300))
def test_steps_that_only_decode_are_told_at_once_to_the_last_bit(shape, rates, rows, first, each):
    cost = StepCost(shape, rates)
    contexts = first * rows + each * np.arange(20)
    shared = [np.array([total - (rows - 1) * first, *[first] * (rows - 1)]) for total in contexts]
    assert cost.decode_seconds(rows, contexts).tolist() == [cost.step_seconds(each, [], []) for each in shared]


def test_nothing_takes_no_time(shape, rates):
    assert StepCost(shape, rates).step_seconds([], [], []) == 0


def test_more_work_takes_longer(shape, rates):
    cost = StepCost(shape, rates)
    base = cost.step_seconds([100, 200], [0], [64])
    assert cost.step_seconds([100, 900], [0], [64]) > base
    assert cost.step_seconds([100, 200, 1], [0], [64]) > base
    assert cost.step_seconds([100, 200], [512], [64]) > base
    assert cost.step_seconds([100, 200], [0], [65]) > base


def test_a_prompt_is_the_sum_of_its_chunks_and_only_the_last_gives_logits(shape, rates):
    cost = StepCost(shape, rates, chunk_tokens=100)
    steps = [((), (40,), (100,), 0), ((), (140,), (100,), 0), ((), (240,), (10,), 1)]
    assert cost.prompt_seconds(40, 250) == pytest.approx(sum(cost.step_seconds(*step) for step in steps))
    assert cost.prompt_seconds(250, 250) == 0


def test_transfers(shape, rates):
    cost = StepCost(shape, rates)
    assert cost.kv_bytes_per_token == 4 * 2 * 2 * 16 * 2
    assert cost.transfer_seconds(10**9, "ddr") == pytest.approx(1 + 1e-5)
    with pytest.raises(KeyError, match="tape"):
        cost.transfer_seconds(1, "tape")
