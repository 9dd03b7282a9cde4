"""metrics: counts what passes and passes it on."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.histogram import Histogram
from sageLLM.operators import metrics as module
from sageLLM.operators.metrics import Metrics
from sageLLM.records import DeadLetter, FinishReason, Pooling, Request, SamplingParams, Sequence, TokenDelta


@pytest.fixture
def measure(drive, make_context):
    """Run lists through the operator; the operator, still answering, and its outlet."""

    def run(*inputs, **config):
        operators = []

        class Watched(Metrics):
            def __init__(self, *args):
                super().__init__(*args)
                operators.append(self)

        out = drive(Watched, config, inputs)
        return operators[0], out

    return run


def test_records_go_on_unchanged_and_in_order(measure, make_completion):
    records = [make_completion("q1"), DeadLetter("bad"), make_completion("q2")]
    _, out = measure(records[:2], records[2:])
    assert all(sent is record for sent, record in zip(out.sent, records, strict=True))


def test_the_summary(measure, make_completion, monkeypatch):
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 12.0))
    completions = [make_completion(f"q{i}", arrival=10.0 + i / 10) for i in range(10)]
    completions[0].choices[0].finish_reason = FinishReason.LENGTH
    for i, completion in enumerate(completions):
        completion.metrics.ttft_ms = 10.0 * (i + 1)
    operator, _ = measure([*completions, DeadLetter("bad")])
    summary = operator.summary()
    assert (summary.requests, summary.failed, summary.finish_reasons) == (10, 1, {"length": 1, "stop": 9})
    assert (summary.prompt_tokens, summary.output_tokens, summary.prefix_hit_tokens) == (30, 20, 20)
    assert summary.prefix_hit_ratio == pytest.approx(2 / 3)
    assert (summary.elapsed_s, summary.requests_per_s, summary.output_tokens_per_s) == (2.0, 5.0, 10.0)
    assert summary.ttft_ms.mean == pytest.approx(55)
    assert (summary.ttft_ms.p50, summary.ttft_ms.p90, summary.ttft_ms.p99) == pytest.approx((50, 90, 100), rel=0.01)
    assert summary.itl_ms.p50 == 0
    assert summary.to_dict()["e2e_ms"]["p50"] == pytest.approx(25, rel=0.01)


def test_embeddings_count_as_requests_without_an_output(measure, make_completion):
    embedded = make_completion("q2", "", tokens=(), pooling=Pooling.MEAN)
    operator, _ = measure([make_completion("q1"), embedded])
    summary = operator.summary()
    assert (summary.requests, summary.prompt_tokens, summary.output_tokens) == (2, 6, 2)
    text = operator.expose()
    assert "sagellm:request_prompt_tokens_count 2" in text
    assert "sagellm:request_generation_tokens_count 1" in text
    assert "sagellm:time_to_first_token_seconds_count 1" in text


def test_an_empty_run_has_a_summary(measure):
    summary = measure()[0].summary()
    assert (summary.requests, summary.elapsed_s, summary.ttft_ms.p99, summary.prefix_hit_ratio) == (0, 0, 0, 0)


def test_inter_token_latency_comes_from_streaming_requests(measure, make_completion, monkeypatch):
    clock = iter([1.0, 1.1, 1.5, 2.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    sequence = Sequence(Request("q1", stream=True), None, SamplingParams())
    deltas = [TokenDelta(sequence, 0, tokens) for tokens in ([1], [2], [3, 4])]
    operator, _ = measure(*([delta] for delta in deltas), [make_completion("q1", stream=True)])
    histogram = operator._figures._histograms["inter_token_latency_seconds"]
    assert (histogram.count, histogram.sum) == (3, pytest.approx(0.5))
    assert histogram.maximum == pytest.approx(0.2)
    assert operator._figures._last_delta == {}


def test_prometheus_text(measure, make_completion, tmp_path):
    operator, _ = measure([make_completion("q1"), make_completion("q2")], path="metrics.prom")
    text = (tmp_path / "metrics.prom").read_text()
    assert text == operator.expose()
    lines = text.splitlines()
    assert 'sagellm:request_success_total{finished_reason="stop"} 2' in lines
    assert "sagellm:generation_tokens_total 4" in lines
    assert "sagellm:prefix_cache_hits_total 4" in lines
    assert "# TYPE sagellm:time_to_first_token_seconds histogram" in lines
    assert 'sagellm:time_to_first_token_seconds_bucket{le="0.01"} 0' in lines
    assert 'sagellm:time_to_first_token_seconds_bucket{le="0.02"} 2' in lines
    assert 'sagellm:time_to_first_token_seconds_bucket{le="+Inf"} 2' in lines
    assert "sagellm:time_to_first_token_seconds_sum 0.04" in lines
    assert "sagellm:time_to_first_token_seconds_count 2" in lines
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.prom"]


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=200), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
@settings(max_examples=100, deadline=None)
def test_quantiles_are_within_one_percent_of_numpys(values, q):
    histogram = Histogram((1.0,))
    for value in values:
        histogram.observe(value)
    exact = float(np.quantile(values, q, method="inverted_cdf"))
    assert histogram.quantile(q) == pytest.approx(exact, rel=0.0101)


def test_memory_does_not_grow_with_the_number_of_values():
    histogram = Histogram((1.0,))
    for value in np.exp(np.random.default_rng(0).uniform(np.log(1e-12), np.log(1e12), 50_000)):
        histogram.observe(float(value))
    assert histogram.count == 50_000
    assert len(pickle.dumps(histogram)) < 30_000
