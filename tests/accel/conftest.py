"""Shapes and rates on which graphs and costs are tested."""

from __future__ import annotations

import pytest

from sageLLM.accel.device_rates import DeviceRates, LinkRates, OperationRates
from sageLLM.accel.execution_graph import NodeKind
from sageLLM.accel.model_work import ModelDimensions


@pytest.fixture(scope="session")
def shape():
    return ModelDimensions(
        num_layers=4, num_heads=8, num_kv_heads=2, head_dim=16, hidden_size=128, intermediate_size=352, vocab_size=1000
    )


@pytest.fixture(scope="session")
def rates():
    """Another rate for each kind, so that no two nodes can be mistaken for one another."""
    operations = {
        kind: OperationRates((1, 8, 64), (1e9 + i * 1e8, 4e9 + i * 3e8, 2e10 + i * 1e9), 1e9 + i * 7e7, 1e-6 * (i + 1))
        for i, kind in enumerate(NodeKind)
        if not kind.is_transfer
    }
    links = {
        name: LinkRates(latency_s, bytes_per_s)
        for name, latency_s, bytes_per_s in (
            ("ddr", 1e-5, 1e9),
            ("nvme", 1e-4, 2e8),
            ("handover", 2e-5, 8e8),
            ("interconnect", 3e-5, 4e8),
        )
    }
    return DeviceRates(operations, links, step_s=1e-3)
