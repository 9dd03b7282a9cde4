"""sagellm bench http: both servers are measured, alone and under load."""

from __future__ import annotations

from sageLLM.benchmarks.http import measure_http


def test_both_servers_are_measured():
    table = measure_http(seconds=0.1, connections=4).splitlines()
    assert [line.split()[0] for line in table[2:6]] == ["sagellm", "sagellm", "bare", "bare"]
    assert table[-1].startswith("HTTP adds ")
