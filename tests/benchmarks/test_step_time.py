"""`sagellm bench step-time` and `bench slo` on a model of nothing much: what they run, and what they print."""

from __future__ import annotations

import random

import pytest

from sageLLM.accel.device_rates import DeviceRates
from sageLLM.benchmarks import slo, step_time, workloads
from sageLLM.benchmarks.slo import CHAT, DOCUMENT, MixedLoad, compare_slo, format_served
from sageLLM.benchmarks.step_time import KINDS, TimedStep, format_errors, random_shape, time_steps
from sageLLM.config import BackendConfig
from sageLLM.runtime.worker import calibration
from sageLLM.runtime.worker.synthetic_steps import StepShape

MICRO = {**workloads.SHAPES["tiny"], "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 300}  # fmt: skip


@pytest.fixture
def micro(monkeypatch):
    monkeypatch.setitem(workloads.SHAPES, "micro", MICRO)
    rates = DeviceRates.from_specification(1e10, 1e9)
    for module in (calibration, step_time):
        monkeypatch.setattr(module, "load_rates", lambda *arguments: rates)


def test_steps_of_every_kind_are_run_and_predicted(micro):
    said = []
    steps = time_steps(BackendConfig(backend_type="cpu", threads=1), "micro", 3, 2, 7, False, said.append)
    assert [step.kind for step in steps] == [kind for kind in KINDS for _ in range(3)]
    assert all(step.measured > 0 and step.predicted > 0 for step in steps)
    assert len(said) == 3
    assert "median error" in format_errors(steps, each=True)


def test_shapes_are_of_their_kind():
    rng = random.Random(0)
    for kind in KINDS:
        for _ in range(50):
            shape = random_shape(kind, rng, max_rows=64, max_chunk=512, max_context=4096)
            assert bool(shape.decode_contexts) == (kind != "prefill")
            assert bool(shape.chunks) == (kind != "decode")
            assert sum(length for _, length in shape.chunks) <= 512
            assert len(shape.decode_contexts) <= 64
            assert shape.last_chunks <= len(shape.chunks)


def test_errors_are_relative_to_what_was_measured():
    steps = [TimedStep("decode", StepShape((1,)), 1.0, 1.1), TimedStep("decode", StepShape((1,)), 1.0, 0.7)]
    steps += [TimedStep("prefill", StepShape(chunks=((0, 5),)), 2.0, 2.0)]
    steps += [TimedStep("hybrid", StepShape((1,), ((0, 5),)), 2.0, 4.0)]
    assert [round(step.error, 9) for step in steps] == [0.1, 0.3, 0, 1]
    rows = dict(line.split(maxsplit=1) for line in format_errors(steps, each=False).splitlines()[2:])
    assert rows["decode"].split()[:2] == ["2", "20.0%"]
    assert rows["hybrid"].split()[1] == "100.0%"


def test_a_mixed_load_is_served_with_and_without(micro):
    load = MixedLoad(0.4, 10, 5, document_tokens=60, chat_tokens=8, chat_outputs=5, document_outputs=2)
    assert [kind for _, kind, _, _ in load.arrivals(300)].count(CHAT) == 4
    results = compare_slo({"backend_type": "cpu", "threads": 1}, "micro", 5.0, load, 1, lambda text: None)
    for served, limit in zip(results, (None, 5.0), strict=True):
        assert served.slo_ms == limit
        assert len(served.latencies[CHAT].ttft) == len(served.latencies[CHAT].tpot) == 4
        assert len(served.latencies[CHAT].itl) == 4 * 4
        assert len(served.latencies[DOCUMENT].ttft) == 2
        assert served.tokens == 4 * 5 + 2 * 2
    assert "chats, SLO 5 ms" in format_served(results)


def test_latencies_between_tokens():
    found = slo.Latencies()
    found.add(1.0, [1.5, 1.7, 2.3])
    found.add(2.0, [2.25])
    assert found.ttft == [0.5, 0.25]
    assert found.tpot == pytest.approx([0.4])
    assert found.itl == pytest.approx([0.2, 0.6])
