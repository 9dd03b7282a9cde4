"""The CPU as a device."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ..torch_ops import TorchBackend
from .attention import AttentionPlan, attend, plan_attention
from .capability import CPUCapability
from .linear import LinearPacker
from .memory import ask_huge_pages

if TYPE_CHECKING:
    from torch import Tensor

    from ...config import DType
    from ..base import Linear, StepLayout


@lru_cache
def _scalar(value: float) -> Tensor:
    return torch.tensor(value)


class CPUBackend(TorchBackend):
    """`Backend` for the CPU.

    Computes in bfloat16 where the processor multiplies it in hardware; elsewhere bfloat16 and float16 weights keep
    their values, and activations and KV are float32.
    """

    name = "cpu"

    def __init__(self, capability: CPUCapability | None = None) -> None:
        super().__init__(torch.device("cpu"))
        self.capability = capability or CPUCapability.probe()
        self.threads = torch.get_num_threads()
        self._packer = LinearPacker(self.capability, self.threads)

    def compute_dtype(self, dtype: DType, checkpoint: torch.dtype) -> torch.dtype:
        wanted = super().compute_dtype(dtype, checkpoint)
        return wanted if wanted is torch.bfloat16 and self.capability.native_bfloat16 else torch.float32

    def allocate_kv(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return ask_huge_pages(torch.empty(shape, dtype=dtype)).zero_()

    def linear(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
        return self._packer.pack(weight, bias, dtype)

    def gated_linear(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
        if self.capability.packs_itself(weight, dtype):
            return self._packer.pack(weight, bias, dtype, gated=True)
        return super().gated_linear(weight, bias, dtype)

    def plan_attention(self, layout: StepLayout, kv: Tensor, num_heads: int) -> AttentionPlan:
        return plan_attention(layout, kv, num_heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, layer: int, plan: Any, scale: float) -> Tensor:
        return attend(q, k, v, kv, layer, plan, scale)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # sqrt(sum + size * eps) is hypot(norm, sqrt(size * eps)): half the calls that F.rms_norm makes on a CPU.
        size = x.shape[-1]
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        norm.hypot_(_scalar((size * eps) ** 0.5)).mul_(size**-0.5)
        return torch.div(x, norm).mul_(weight).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual.add_(x)
        return self.rms_norm(residual, weight, eps), residual

    def synchronize(self) -> None:
        """Wait until every weight is packed; raises what packing raised."""
        self._packer.wait()
