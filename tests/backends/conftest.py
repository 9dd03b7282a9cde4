"""Random steps over a paged pool, and a float64 attention that knows nothing of pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from sageLLM.backends.base import StepLayout
from sageLLM.backends.cpu.capability import CPUCapability

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

needs_kernels = pytest.mark.skipif(not CPUCapability.probe().kernels, reason="no AVX512-bf16, or kernels not compiled")


@dataclass
class Step:
    """A random step: its layout, the pool before it, and each sequence's whole K and V in float64."""

    layout: StepLayout
    kv: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    histories: list[tuple[Tensor, Tensor]]

    def expected(self, scale: float) -> Tensor:
        """Attention of every token over its own sequence, token by token, in float64: [T, H, D]."""
        rows, token = [], 0
        for (keys, values), length in zip(self.histories, self.layout.query_lens, strict=True):
            context = keys.shape[0]
            for position in range(context - length, context):
                seen_keys, seen_values = keys[: position + 1], values[: position + 1]
                group = self.q.shape[1] // keys.shape[1]
                heads = []
                for head in range(self.q.shape[1]):
                    scores = seen_keys[:, head // group] @ self.q[token, head].double() * scale
                    heads.append(scores.softmax(0) @ seen_values[:, head // group])
                rows.append(torch.stack(heads))
                token += 1
        return torch.stack(rows)


class StepBuilder:
    """Builds steps from (context, query length) pairs; decodes are those of query length 1 that come first."""

    def __init__(self, num_layers: int = 3, heads: int = 4, kv_heads: int = 2, block_size: int = 4, dim: int = 8):
        self.num_layers, self.heads, self.kv_heads = num_layers, heads, kv_heads
        self.block_size, self.dim = block_size, dim

    def __call__(
        self, sequences: list[tuple[int, int]], num_decodes: int, layer: int, dtype: torch.dtype, seed: int
    ) -> Step:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw).to(dtype)

        counts = [-(-context // self.block_size) for context, _ in sequences]
        num_blocks = sum(counts) + 3
        ids = torch.randperm(num_blocks, generator=draw)
        kv = normal(num_blocks, self.num_layers, 2, self.kv_heads, self.block_size, self.dim)
        tables = torch.zeros(len(sequences), max(counts), dtype=torch.int64)
        k_parts, v_parts, slots, positions, histories = [], [], [], [], []
        start = 0
        for index, (context, length) in enumerate(sequences):
            table = ids[start : start + counts[index]]
            start += counts[index]
            tables[index, : counts[index]] = table
            cached = kv[table, layer].permute(1, 0, 3, 2, 4).reshape(2, -1, self.kv_heads, self.dim)[:, :context]
            new_k, new_v = normal(length, self.kv_heads, self.dim), normal(length, self.kv_heads, self.dim)
            keys, values = cached.double().clone()
            keys[context - length :], values[context - length :] = new_k.double(), new_v.double()
            histories.append((keys, values))
            place = torch.arange(context - length, context)
            slots.append(table[place // self.block_size] * self.block_size + place % self.block_size)
            positions.append(place)
            k_parts.append(new_k)
            v_parts.append(new_v)
        layout = StepLayout(
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            block_tables=tables,
            context_lens=torch.tensor([context for context, _ in sequences]),
            query_lens=[length for _, length in sequences],
            num_decodes=num_decodes,
        )
        tokens = len(layout.positions)
        q = normal(tokens, self.heads, self.dim)
        return Step(layout, kv, q, torch.cat(k_parts), torch.cat(v_parts), histories)


@pytest.fixture
def build_step() -> StepBuilder:
    return StepBuilder()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
