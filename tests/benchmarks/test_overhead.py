"""`sagellm bench overhead`: everything comes out, and the profile says on whose behalf time was spent."""

from __future__ import annotations

import signal

import pytest

from sageLLM.benchmarks.overhead import measure_overhead
from sageLLM.benchmarks.stage_profiler import _stage_of


@pytest.fixture(autouse=True)
def collector_untouched(monkeypatch):
    monkeypatch.setattr("sageLLM.runtime.garbage.collect_rarely", lambda: None)


def test_all_requests_come_out_and_the_profiler_leaves_no_trace():
    handler = signal.getsignal(signal.SIGPROF)
    report = measure_overhead(40, 16, profile=True)
    assert report.requests == 40
    assert report.tokens_per_second == pytest.approx(32 * report.requests_per_second)
    assert "us of CPU time per request" in report.profile
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGPROF) == handler


@pytest.mark.parametrize(
    ("calls", "stage"),
    [
        (["records to_dict", "operators/sinks/result_format dump", "operators/sinks/jsonl_sink process"], "jsonl_sink"),
        (["kv_runtime/cache commit_all", "operators/kv_commit process", "runtime/flow/operator run"], "kv_commit"),
        (["runtime/flow/custody take", "runtime/flow/ports send", "operators/tokenize process"], "flow"),
        (["kv_runtime/pool take", "runtime/worker/worker _launch", "runtime/worker/worker step"], "worker: launch"),
        ([], "event loop and the rest"),
    ],
)
def test_time_belongs_to_the_stage_that_asked_for_it(calls, stage):
    assert _stage_of([(f"{call.split()[0]}.py", call.split()[1]) for call in calls]) == stage
