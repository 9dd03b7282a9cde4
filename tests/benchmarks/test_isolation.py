"""What a step costs more in a process of its own, measured on few of them."""

from __future__ import annotations

from sageLLM.benchmarks.isolation import IsolationReport, measure_isolation


def test_both_are_measured_in_turns():
    report = measure_isolation("builtin:null", batch=3, steps=20, threads=1, depth=2)
    assert len(report.thread_us) == len(report.process_us) == 7
    assert min(report.thread_us + report.process_us) > 0


def test_the_overhead_is_the_median_of_the_rounds_differences():
    report = IsolationReport("m", 1, 1, thread_us=[10, 20, 30], process_us=[110, 125, 400])
    assert report.overhead_us == 105
