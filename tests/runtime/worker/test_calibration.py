"""Measuring this device: real steps of a tiny model. What the times are nobody can say; that they are told, one can."""

from __future__ import annotations

import numpy as np
import pytest

from sageLLM.accel.execution_graph import NodeKind
from sageLLM.accel.model_work import ModelWork
from sageLLM.accel.step_cost import StepCost
from sageLLM.backends import detect_backend
from sageLLM.config import BackendConfig, ModelConfig, SageLLMConfig
from sageLLM.errors import ConfigError
from sageLLM.models.resolve import resolve_model
from sageLLM.models.weights import load_model
from sageLLM.runtime.services import EngineServices
from sageLLM.runtime.worker import calibration
from sageLLM.runtime.worker.step_probe import StepProbe
from sageLLM.runtime.worker.synthetic_steps import StepShape, SyntheticSteps
from sageLLM.runtime.worker.torch_executor import TorchExecutor

CPU = BackendConfig(backend_type="cpu", threads=1)


@pytest.fixture(scope="module")
def model(checkpoint_folder):
    return resolve_model(ModelConfig(model_id=str(checkpoint_folder("qwen3"))))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A measurement of a second, kept in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "ROWS", (1, 8))
    monkeypatch.setattr(calibration, "CONTEXTS", ((1, 100), (4, 100)))
    monkeypatch.setattr(calibration, "LENGTHS", (16, 64))
    monkeypatch.setattr(calibration, "PASSES", 2)
    return tmp_path


def test_every_kind_and_path_is_measured_once_and_found_again(model, small, monkeypatch):
    backend = detect_backend(CPU)
    rates = calibration.load_rates(model, backend, small / "kv")
    assert set(rates.operations) == {kind for kind in NodeKind if not kind.is_transfer}
    assert {"ddr", "nvme", "handover"} <= set(rates.links)
    assert rates.step_s > 0
    assert StepCost(model.architecture, rates).step_seconds([10, 20], [0], [8]) > 0
    assert not list((small / "kv").iterdir()), "what was written to measure the disk is gone"
    monkeypatch.setattr(calibration, "measure_rates", None)
    assert calibration.load_rates(model, backend, small / "kv") == rates
    with pytest.raises(TypeError):  # measured apart for another device, dtype, disk ...
        calibration.load_rates(model, backend)


def test_a_device_that_runs_behind_is_measured_whole_and_in_parts(model, small, monkeypatch):
    """On such a one waiting for each part would cost more than the part: the whole step without it counts."""
    stopped = []

    class Probe(StepProbe):
        def mark(self, kind, rows, count=1):
            stopped.append(self.stopped)
            super().mark(kind, rows, count)

    monkeypatch.setattr(calibration, "StepProbe", Probe)
    monkeypatch.setattr(calibration, "runs_behind", lambda backend: True)
    rates = calibration.load_rates(model, detect_backend(CPU), small / "kv")
    assert set(stopped) == {False, True}
    cost = StepCost(model.architecture, rates)
    assert 0 < cost.step_seconds([10], [], []) < cost.step_seconds([10] * 8, [0], [64])


def test_the_key_knows_what_changes_the_rates(model):
    from dataclasses import replace

    backend = detect_backend(CPU)
    key = calibration.rates_key(model, backend, None)
    assert key == calibration.rates_key(replace(model, seed=5, fingerprint="other"), backend, None)
    wider = replace(model.architecture, hidden_size=128)
    assert key != calibration.rates_key(replace(model, architecture=wider), backend, None)
    assert key["device"]


def test_a_probe_sees_each_part_as_often_as_the_graph_has_it(model):
    """And the model computes the same with it."""
    from collections import Counter

    from sageLLM.accel.graph_builder import ExecutionGraphBuilder

    def run(probed):
        backend = detect_backend(CPU)
        loaded = load_model(model, backend)
        probe = StepProbe(loaded) if probed else None
        executor = TorchExecutor(loaded, backend, 64, 4, 8)
        steps = SyntheticSteps(executor, 64, 4, 8, loaded.vocab_size)
        shape = StepShape((9, 30), ((8, 5), (0, 7)), last_chunks=1)
        result = executor.launch(steps.plan(shape)).result()
        executor.close()
        return result.tokens, probe

    tokens, _ = run(probed=False)
    again, probe = run(probed=True)
    assert np.array_equal(tokens, again)
    graph = ExecutionGraphBuilder(model.architecture).build_hybrid_graph([9, 30], [(8, 5), (0, 7)], logit_rows=3)
    wanted = Counter((node.kind, node.rows) for node in graph if "attn" not in node.kind)
    del wanted[NodeKind.SAMPLE, 3]  # after the model
    wanted[NodeKind.LAYERNORM, 14] -= 1  # the first norm counts with the embedding
    counted = {key: count for key, count in probe.counts.items() if "attn" not in key[0] and key[0] != "step"}
    assert counted == wanted


def test_a_synthetic_step_gives_the_model_what_a_request_would(model):
    backend = detect_backend(CPU)
    executor = TorchExecutor(load_model(model, backend), backend, 64, 4, 8)
    steps = SyntheticSteps(executor, 64, 4, 8, model.vocab_size)
    assert not steps.fits(StepShape((1,) * 9))
    assert not steps.fits(StepShape((257,)))
    shape = StepShape((4, 5), ((6, 3), (0, 2)), last_chunks=1)
    assert steps.fits(shape)
    plan = steps.plan(shape)
    assert plan.num_tokens == 7
    assert plan.decode_positions.tolist() == [3, 4]
    assert plan.sample_rows.tolist() == [0, 1, 4]
    tables = [row[: -(-context // 4)].tolist() for row, context in zip(plan.block_tables, shape.contexts, strict=True)]
    used = [block for table in tables for block in table]
    assert len(set(used)) == len(used), "no two rows share a block"
    assert len(executor.launch(plan).result().tokens) == 3
    executor.close()


def test_services_tell_the_cost_of_the_configured_model(model, small, checkpoint_folder):
    folder = str(checkpoint_folder("qwen3"))
    config = SageLLMConfig(model={"model_id": folder}, backend={"backend_type": "cpu", "threads": 1})
    cost = EngineServices(config).step_cost
    assert cost.step_seconds([10], [], []) > 0
    assert cost.kv_bytes_per_token == ModelWork(model.architecture, None, 4).kv_bytes_per_token
    config = SageLLMConfig(model=config.model, backend=config.backend, scheduler={"tpot_slo_ms": 20})
    services = EngineServices(config)
    assert services.worker.planner._chunk_budget._cost is services.step_cost
    services.executors[0].close()
    with pytest.raises(ConfigError, match="builtin:null"):
        EngineServices(SageLLMConfig(model={"model_id": "builtin:null"})).step_cost  # noqa: B018
