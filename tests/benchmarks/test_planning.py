"""`sagellm bench plan`: its load is what it says."""

from __future__ import annotations

import pytest

from sageLLM.benchmarks import planning


@pytest.mark.parametrize(
    ("policy", "mode", "slo_ms"), [("fcfs", "hybrid", 12.0), ("longest_prefix", "time_share", None)]
)
def test_rows_run_and_sequences_wait_all_the_time(monkeypatch, policy, mode, slo_ms):
    seen = []
    services_of = planning.EngineServices

    def watch(config):
        seen.append(services_of(config))
        return seen[-1]

    monkeypatch.setattr(planning, "OUTPUT_TOKENS", (4, 16))
    monkeypatch.setattr(planning, "EngineServices", watch)
    times = planning.measure_planning(8, 20, 50, policy, mode, slo_ms)
    (services,) = seen
    assert len(times.plan) == len(times.grant) == 50
    assert 4 <= services.worker.num_running <= 8, "some have just ended"
    assert len(services.waiting) >= 20 - 8
    assert all(float(cell) > 0 for cell in times.row())
