"""sagellm bench http: the pipeline is measured with HTTP and without, and beside a bare server."""

from __future__ import annotations

from sageLLM.benchmarks.http import measure_http


def test_each_is_measured_alone_and_under_load():
    table = measure_http(seconds=0.1, connections=4).splitlines()
    assert [line.split()[0] for line in table[2:8]] == ["in", "in", "http", "http", "bare", "bare"]
    assert table[-1].startswith("HTTP adds ")
