"""Gates: figures that a run must reach."""

from __future__ import annotations

import pytest

from sageLLM.benchmarks.gates import check_gates
from sageLLM.config import BenchmarkConfig
from sageLLM.errors import GateError
from sageLLM.operators.metrics import MetricsSummary, Percentiles


def summary(throughput=100.0, ttft=50.0, tpot=10.0):
    nothing = Percentiles(0, 0, 0, 0)
    # only means are judged
    return MetricsSummary(
        requests=10, failed=0, finish_reasons={}, prompt_tokens=0, output_tokens=100, prefix_hit_tokens=0,
        elapsed_s=1.0, requests_per_s=10.0, output_tokens_per_s=throughput, queue_ms=nothing,
        ttft_ms=Percentiles(ttft, 0, 0, 9999), tpot_ms=Percentiles(tpot, 0, 0, 9999), itl_ms=nothing, e2e_ms=nothing,
    )  # fmt: skip


def gates(**limits):
    return BenchmarkConfig(enable_gates=True, **limits)


def test_reached_to_the_figure_is_reached():
    check_gates(gates(min_throughput_tps=100, max_ttft_ms=50, max_tpot_ms=10), summary())


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"min_throughput_tps": 101}, "throughput 100.0 tokens/s is below 101"),
        ({"max_ttft_ms": 49}, "mean TTFT 50.0 ms is above 49"),
        ({"max_tpot_ms": 9.5}, "mean TPOT 10.0 ms is above 9.5"),
    ],
)
def test_a_missed_gate_says_by_how_much(limits, said):
    with pytest.raises(GateError) as raised:
        check_gates(gates(**limits), summary())
    assert str(raised.value) == said
    assert raised.value.exit_code == 1


def test_all_that_were_missed_are_named():
    with pytest.raises(GateError) as raised:
        check_gates(gates(min_throughput_tps=101, max_ttft_ms=49, max_tpot_ms=10), summary())
    assert str(raised.value).count(";") == 1


def test_without_enable_gates_nothing_is_judged():
    check_gates(BenchmarkConfig(), summary(throughput=0))
