"""The metrics stage fails and is restarted: its figures are still those of the whole run."""

from __future__ import annotations

import re

from sageLLM.operators.metrics import Metrics


def test_the_figures_outlive_a_restart(make_run, make_requests, tmp_path, monkeypatch):
    write, calls = Metrics._write_file, []

    def fail_later(self):
        calls.append(None)
        if len(calls) == 5:
            raise OSError("no space left on device")
        write(self)

    monkeypatch.setattr(Metrics, "_write_file", fail_later)
    path = tmp_path / "metrics.prom"
    run = make_run(make_requests(40), operators={"metrics": {"path": str(path), "interval_s": 1e-9}})()
    assert run.flow.report().operators["metrics"]["restarts"] == 1
    assert run.counts == {"accepted": 40, "done": 40}, "what had been counted was not passed on"
    summary = run.flow.operators["metrics"].summary()
    assert summary.requests == 40
    assert summary.output_tokens == sum(completion.output_length for completion in run.completions.values())
    written = re.findall(r"^sagellm:request_success_total\{.*\} (\d+)$", path.read_text(), re.MULTILINE)
    assert sum(map(int, written)) == 40
