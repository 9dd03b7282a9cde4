"""Paged attention of every backend against a naive one in float64."""

from __future__ import annotations

import random

import pytest
import torch

from sageLLM.backends.base import StepLayout
from sageLLM.backends.cpu import AVX512Backend, CPUBackend
from sageLLM.backends.cpu import attention as cpu_attention
from sageLLM.backends.cpu.kernels import PagedAttention
from sageLLM.backends.torch_ops import TorchBackend

from .conftest import StepBuilder, needs_kernels

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


@needs_kernels
@pytest.mark.parametrize(
    ("heads", "kv_heads", "block_size", "dim"), [(14, 2, 16, 64), (8, 8, 4, 96), (32, 1, 7, 128), (4, 2, 16, 256)]
)
def test_our_kernel_equals_float64(heads, kv_heads, block_size, dim) -> None:
    backend, build = AVX512Backend(), StepBuilder(2, heads, kv_heads, block_size, dim)
    sequences = [(1, 1), (64, 1), (65, 1), (130, 1), (6, 6), (77, 77), (200, 50), (64, 64), (129, 1)]
    step = build(sequences, 4, 1, torch.bfloat16, seed=1)
    assert isinstance(backend.plan_attention(step.layout, step.kv, heads), PagedAttention)
    check(backend, step, 1)


@needs_kernels
@pytest.mark.parametrize("seed", range(6))
def test_our_kernel_on_random_mixes(seed) -> None:
    draw = random.Random(seed)
    decodes = [(draw.randint(1, 300), 1) for _ in range(draw.randint(0, 9))]
    chunks = []
    for _ in range(draw.randint(0 if decodes else 1, 3)):
        length = draw.randint(1, 100)
        chunks.append((length + draw.choice([0, 1, 63, 64, 190]), length))
    step = StepBuilder(2, 6, 2, 16, 32)(decodes + chunks, len(decodes), 0, torch.bfloat16, seed)
    torch.set_num_threads(2)
    check(AVX512Backend(), step, 0)


@needs_kernels
def test_our_kernel_gives_a_row_the_same_bits_in_any_batch_and_chunk() -> None:
    """The whole prompt at once, its last tokens alone, and each of those beside other sequences."""
    backend = AVX512Backend()
    whole = StepBuilder(1, 14, 2, 16, 64)([(150, 150), (90, 90)], 0, 0, torch.bfloat16, seed=4)
    expected = attend(backend, whole.layout, whole.q, whole.k, whole.v, whole.kv)
    for lengths in ([1, 1], [7, 1], [1, 60], [149, 88]):
        layout = StepLayout(
            whole.layout.positions, whole.layout.slots, whole.layout.block_tables, whole.layout.context_lens, lengths, 0
        )
        rows = torch.cat([torch.arange(150 - lengths[0], 150), torch.arange(240 - lengths[1], 240)])
        layout.slots = whole.layout.slots[rows]
        part = attend(backend, layout, whole.q[rows], whole.k[rows], whole.v[rows], whole.kv)
        assert torch.equal(part, expected[rows])


def attend(backend: TorchBackend, layout, q, k, v, kv) -> torch.Tensor:
    return backend.attend(q, k, v, kv, 0, backend.plan_attention(layout, kv, q.shape[1]), 0.2)


@needs_kernels
def test_shapes_that_our_kernel_does_not_take() -> None:
    backend = AVX512Backend()
    for dim, dtype in ((8, torch.bfloat16), (64, torch.float32)):
        check(backend, StepBuilder(dim=dim)([(9, 1), (70, 30)], 1, 1, dtype, seed=2), 1)


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
