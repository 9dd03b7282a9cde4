"""From times to rates: what made the times is found again."""

from __future__ import annotations

import numpy as np
import pytest

from sageLLM.accel.device_rates import DeviceRates, OperationRates
from sageLLM.accel.execution_graph import NodeKind
from sageLLM.accel.graph_builder import ExecutionGraphBuilder
from sageLLM.accel.rate_fitting import Observation, fit_rates, nonnegative_least_squares

ROWS = (1, 4, 16, 64, 256)


@pytest.fixture(scope="module")
def device():
    """A norm of few rows is nothing but a launch, as on a real one."""
    rows = OperationRates(ROWS, (1e9, 4e9, 1e10, 2e10, 2.5e10), 1e12, launch_s=2e-5)
    operations = dict.fromkeys((kind for kind in NodeKind if not kind.is_transfer), rows)
    operations[NodeKind.LAYERNORM] = OperationRates((1, 256), (1e15, 1e15), 1e15, launch_s=2e-5)
    operations[NodeKind.DECODE_ATTN] = OperationRates((1, 64), (8e10, 8e10), 1e15, launch_s=5e-5, row_s=1e-6)
    operations[NodeKind.PREFILL_ATTN] = OperationRates((16, 256), (1e11, 2e11), 1e15, launch_s=6e-5, row_s=5e-7)
    return DeviceRates(operations, step_s=1e-3)


def observe(shape, device, disturbed=()):
    builder = ExecutionGraphBuilder(shape)
    for rows in ROWS:
        for context in (32, 40_000):
            yield from _nodes(builder.build_decode_graph([context] * rows), device, disturbed)
    for length in (16, 256):
        for start in (0, 100_000):
            yield from _nodes(builder.build_prefill_graph([(start, length)], logit_rows=0), device, disturbed)


def _nodes(graph, device, disturbed):
    for node in graph:
        slower = 3 if node.layer in disturbed else 1
        yield Observation(node.kind, node.rows, node.flops, node.num_bytes, slower * device.node_seconds(node))


@pytest.mark.parametrize("disturbed", [(), (0,)])
def test_a_step_is_predicted_as_the_device_takes_it(shape, device, disturbed):
    fitted = fit_rates(observe(shape, device, disturbed), step_s=1e-3)
    builder = ExecutionGraphBuilder(shape)
    for contexts, chunks in (([100] * 10, []), ([30_000, 5], [(50_000, 200)]), ([], [(0, 64), (7_000, 40)])):
        graph = builder.build_hybrid_graph(contexts, chunks)
        assert graph.estimate_total_time(fitted) == pytest.approx(graph.estimate_total_time(device), rel=0.05)


def test_attention_that_is_nothing_but_launches_costs_nothing_for_its_context(shape, device):
    """As on a device that computes row after row, with a little noise."""
    busy = OperationRates((1,), (1e18,), 1e18, launch_s=5e-5, row_s=4e-4)
    kinds = dict(device.operations) | dict.fromkeys((NodeKind.DECODE_ATTN, NodeKind.PREFILL_ATTN), busy)
    launching = DeviceRates(kinds, step_s=1e-3)
    seen = [one._replace(seconds=one.seconds * (1 + 0.02 * (-1) ** at))
            for at, one in enumerate(observe(shape, launching))]  # fmt: skip
    fitted = fit_rates(seen, step_s=1e-3)
    for contexts in ([100] * 10, [30_000] * 3, [40_000] * 200):
        graph = ExecutionGraphBuilder(shape).build_decode_graph(contexts)
        assert graph.estimate_total_time(fitted) == pytest.approx(graph.estimate_total_time(launching), rel=0.06)


def test_what_was_not_measured_is_named():
    seen = [Observation(kind, 1, 1.0, 1.0, 1e-3) for kind in NodeKind if not kind.is_transfer]
    with pytest.raises(ValueError, match="nothing was measured of ffn"):
        fit_rates([one for one in seen if one.kind is not NodeKind.FFN], step_s=0)


def test_fewer_rows_are_never_slower_than_more():
    times = {1: 5e-3, 4: 1e-3, 16: 2e-3}  # the first was disturbed
    seen = [Observation(kind, rows, 1e6 * rows, 1e6, s) for kind in NodeKind if not kind.is_transfer
            for rows, s in times.items()]  # fmt: skip
    rates = fit_rates(seen, step_s=0).operations[NodeKind.FFN]
    assert rates.seconds(1, 1e6, 1e6) <= rates.seconds(4, 4e6, 1e6) * 1.0001 <= rates.seconds(16, 16e6, 1e6)


def test_least_squares_meet_the_conditions_of_an_optimum():
    """Karush, Kuhn, Tucker: no coordinate can be made better, those at 0 not even by raising them."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        columns, wanted = rng.normal(size=(8, 3)), rng.normal(size=8)
        found = nonnegative_least_squares(columns, wanted)
        slope = columns.T @ (columns @ found - wanted)
        assert (found >= 0).all()
        assert (slope >= -1e-9).all()
        assert found * slope == pytest.approx(0, abs=1e-9)
