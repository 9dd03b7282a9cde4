"""The backend protocol in plain torch, on any device: no tuning, one sequence at a time. The other backends start
from it and their tests compare with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..config import DType
from .host import memory_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .base import Linear, StepLayout

TORCH_DTYPES = {DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16, DType.FLOAT16: torch.float16}


class PlainLinear:
    """A weight as it is: torch's own product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class GatedLinear:
    """The product with [gate; up], then silu(gate) * up."""

    def __init__(self, gate_up: Linear, activate: Callable[[Tensor], Tensor]) -> None:
        self._gate_up = gate_up
        self._activate = activate

    def __call__(self, x: Tensor) -> Tensor:
        return self._activate(self._gate_up(x))


@dataclass(slots=True)
class PlainPlan:
    """A step's layout on the device."""

    slots: Tensor
    block_tables: Tensor
    context_lens: list[int]
    query_lens: list[int]


class TorchBackend:
    """Reference implementation of `Backend`."""

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def compute_dtype(self, dtype: DType, checkpoint: torch.dtype) -> torch.dtype:
        return checkpoint if dtype is DType.AUTO else TORCH_DTYPES[dtype]

    def allocate_kv(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def copy_blocks(self, kv: Tensor, sources: list[int], targets: list[int]) -> None:
        if sources:
            kv[torch.tensor(targets, device=kv.device)] = kv[torch.tensor(sources, device=kv.device)]

    def linear(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
        weight = weight.to(self.device, dtype)
        return PlainLinear(weight, None if bias is None else bias.to(self.device, dtype))

    def gated_linear(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
        return GatedLinear(self.linear(weight, bias, dtype), self.silu_and_mul)

    def plan_attention(self, layout: StepLayout, kv: Tensor, num_heads: int) -> Any:
        return PlainPlan(
            layout.slots.to(self.device),
            layout.block_tables.to(self.device),
            layout.context_lens.tolist(),
            layout.query_lens,
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, layer: int, plan: Any, scale: float) -> Tensor:
        num_kv_heads, block_size, head_dim = kv.shape[3:]
        blocks, offsets = plan.slots // block_size, plan.slots % block_size
        kv[blocks, layer, 0, :, offsets] = k
        kv[blocks, layer, 1, :, offsets] = v
        group = q.shape[1] // num_kv_heads
        out = torch.empty_like(q)
        start = 0
        for index, (context, length) in enumerate(zip(plan.context_lens, plan.query_lens, strict=True)):
            table = plan.block_tables[index, : -(-context // block_size)]
            # [B, 2, K, P, D] -> [2, K, tokens, D]
            cached = kv[table, layer].permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, :context]
            keys, values = cached.repeat_interleave(group, dim=1)
            token = torch.arange(context, device=self.device)
            visible = token <= token[context - length :, None]
            rows = q[start : start + length].transpose(0, 1)
            out[start : start + length] = F.scaled_dot_product_attention(
                rows, keys, values, attn_mask=visible, scale=scale
            ).transpose(0, 1)
            start += length
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), None, eps) * weight

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return self.rms_norm(residual, weight, eps), residual

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2I] -> silu(first half) * second half, [T, I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory_bytes(self) -> tuple[int, int]:
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return free + kept, total  # what torch keeps of earlier tensors is free for new ones
        return memory_bytes()
