"""Paged attention of every backend against a naive one in float64."""

from __future__ import annotations

import random

import pytest
import torch

from sageLLM.backends.cpu import CPUBackend
from sageLLM.backends.cpu import attention as cpu_attention
from sageLLM.backends.torch_ops import TorchBackend

BACKENDS = {"torch": lambda: TorchBackend(torch.device("cpu")), "cpu": CPUBackend}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> TorchBackend:
    return BACKENDS[request.param]()


def check(backend: TorchBackend, step, layer: int) -> None:
    before, scale = step.kv.clone(), 0.3
    plan = backend.plan_attention(step.layout, step.kv, step.q.shape[1])
    out = backend.attend(step.q, step.k, step.v, step.kv, layer, plan, scale)
    torch.testing.assert_close(out.double(), step.expected(scale), rtol=0, atol=TOLERANCE[step.q.dtype])

    block_size = step.kv.shape[4]
    blocks, offsets = step.layout.slots // block_size, step.layout.slots % block_size
    assert torch.equal(step.kv[blocks, layer, 0, :, offsets], step.k)
    assert torch.equal(step.kv[blocks, layer, 1, :, offsets], step.v)
    before[blocks, layer, :, :, offsets] = step.kv[blocks, layer, :, :, offsets]
    assert torch.equal(step.kv, before), "nothing but this step's slots of this layer is written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("sequences", "num_decodes"),
    [
        ([(1, 1)], 1),
        ([(9, 1)], 1),
        ([(8, 1), (8, 1)], 2),
        ([(3, 1), (17, 1), (8, 1)], 3),
        ([(5, 5)], 0),
        ([(13, 6)], 0),
        ([(12, 4), (4, 4), (1, 1)], 0),
        ([(7, 1), (30, 1), (6, 6), (21, 3), (9, 1)], 2),
    ],
    ids=["first", "decode", "even", "ragged", "whole prompt", "chunk", "chunks", "mixed"],
)
def test_equals_float64(backend, build_step, sequences, num_decodes, dtype) -> None:
    for layer in range(3):
        check(backend, build_step(sequences, num_decodes, layer, dtype, seed=layer), layer)


@pytest.mark.parametrize("seed", range(12))
def test_random_mixes(backend, build_step, seed, monkeypatch) -> None:
    """Small limits, so that groups split and masks are cut."""
    monkeypatch.setattr(cpu_attention, "SPLIT_BYTES", 600)
    monkeypatch.setattr(cpu_attention, "MASK_ELEMENTS", 300)
    draw = random.Random(seed)
    decodes = [(draw.randint(1, 60), 1) for _ in range(draw.randint(0, 6))]
    chunks = []
    for _ in range(draw.randint(0 if decodes else 1, 3)):
        length = draw.randint(1, 12)
        chunks.append((length + draw.choice([0, 1, 7, 30]), length))
    check(backend, build_step(decodes + chunks, len(decodes), 1, torch.float32, seed), 1)


def test_strided_inputs(backend, build_step) -> None:
    """K and V are parts of one packed projection."""
    step = build_step([(6, 1), (11, 1), (10, 4)], 2, 0, torch.float32, seed=3)
    packed = torch.cat((step.q, step.k, step.v), dim=1)
    step.q, step.k, step.v = packed.split((4, 2, 2), dim=1)
    check(backend, step, 0)


def test_groups_are_cut_where_padding_is_dear(monkeypatch) -> None:
    group = cpu_attention.group_by_length
    assert group([], 100) == []
    monkeypatch.setattr(cpu_attention, "SPLIT_BYTES", 1000)
    assert group([3, 12, 5], 50) == [[0, 1, 2]]  # two groups would save 14 blocks, 700 bytes
    assert group([3, 12, 5], 100) == [[1], [2, 0]]  # 1400 bytes
    assert group([40, 2, 41, 20, 1], 100) == [[2, 0], [3], [1, 4]]
