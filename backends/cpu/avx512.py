"""A CPU that multiplies bfloat16 in hardware: our own kernels for bfloat16, torch's operations for everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import kernels
from .backend import CPUBackend
from .kernels import has_dense_rows

if TYPE_CHECKING:
    from torch import Tensor

    from ..base import StepLayout


class AVX512Backend(CPUBackend):
    """`Backend` with the kernels of `native/`. In bfloat16 a row's result depends neither on the rest of the batch nor
    on how its prompt was cut into chunks, bit for bit, as long as values are finite and the shapes suit the kernels
    (those of every common model do)."""

    def plan_attention(self, layout: StepLayout, kv: Tensor, num_heads: int) -> Any:
        if kernels.PagedAttention.supports(kv, num_heads):
            return kernels.PagedAttention(layout, kv, num_heads, self.threads)
        return super().plan_attention(layout, kv, num_heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, layer: int, plan: Any, scale: float) -> Tensor:
        if isinstance(plan, kernels.PagedAttention):
            return plan.attend(q, k, v, layer, scale)
        return super().attend(q, k, v, kv, layer, plan, scale)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if _norms(weight, x):
            return kernels.rms_norm(None, x, weight, eps, self.threads)
        return super().rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if _norms(weight, x, residual):
            return kernels.rms_norm(x, residual, weight, eps, self.threads), residual
        return super().add_rms_norm(x, residual, weight, eps)

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens, _, dim = x.shape
        tables = all(table.shape == (tokens, 1, dim) and table.is_contiguous() for table in (cos, sin))
        if tables and dim % 32 == 0 and all(map(has_dense_rows, (x, cos, sin))):
            kernels.rotate(x, cos, sin, self.threads)
            return x
        return super().apply_rope(x, cos, sin)


def _norms(weight: Tensor, *rows: Tensor) -> bool:
    fits = all(x.dim() == weight.dim() + 1 and x.shape[1:] == weight.shape for x in rows)
    dense = weight.is_contiguous() and all(map(has_dense_rows, (weight, *rows)))
    return fits and dense and weight.shape[-1] % 16 == 0
