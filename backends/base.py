"""What a device must be able to do for a decoder model. Shape letters: T tokens of a step, S sequences in it,
H query heads, K kv heads, D head dim, N blocks of the pool, L layers, P tokens of a block, B blocks of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config import DType


@dataclass(slots=True)
class StepLayout:
    """How one step's tokens lie. Decoding sequences (one token each) come first, then prompt chunks.

    Host tensors on CPU; the backend moves what it needs.
    """

    positions: Tensor  # [T] int64, position of each token in its sequence
    slots: Tensor  # [T] int64, where its K and V go: block id * P + offset in block
    block_tables: Tensor  # [S, B] int64, block ids of each sequence, padded with 0
    context_lens: Tensor  # [S] int64, tokens of each sequence including this step's
    query_lens: list[int]  # [S], tokens of each sequence in this step
    num_decodes: int  # the first num_decodes sequences have query_len 1


class Linear(Protocol):
    """A weight packed for its device."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        ...


class Backend(Protocol):
    """One device. All tensors handed to the compute methods lie on `device` in `compute_dtype`."""

    name: str
    device: torch.device

    def compute_dtype(self, dtype: DType, checkpoint: torch.dtype) -> torch.dtype:
        """The element type of activations and KV for weights of `dtype` (`auto`: the checkpoint's)."""
        ...

    def allocate_kv(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised KV pool [N, L, 2, K, P, D]; every value must be finite (masked positions are read)."""
        ...

    def copy_blocks(self, kv: Tensor, sources: list[int], targets: list[int]) -> None:
        """Copy whole blocks inside the pool, all layers at once (copy on write)."""
        ...

    def linear(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
        """Take a checkpoint's weight [out, in] and pack it; the caller drops its own reference."""
        ...

    def gated_linear(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
        """Like `linear` for [gate; up] [2I, in]: the product is silu(x * gate) * (x * up), [T, I]."""
        ...

    def plan_attention(self, layout: StepLayout, kv: Tensor, num_heads: int) -> Any:
        """Whatever `attend` needs that is the same for every layer of the step: indices, masks, scratch."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, layer: int, plan: Any, scale: float) -> Tensor:
        """Write k, v [T, K, D] to the pool, then causal paged attention of q [T, H, D] -> [T, H, D]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., D] / rms(x) * weight, accumulated in float32. The weight is [D], or one for each head: [H, D]."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(residual + x), residual + x). Both inputs are given up: either may be written to."""
        ...

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the pairs (i, i + D/2) of heads x [T, H, D]: x * cos + swap_halves(x) * sin. x is given up.

        cos, sin [T, 1, D]: cos repeated for both halves, sin negated in the first.
        """
        ...

    def synchronize(self) -> None:
        """Wait until everything queued on the device is done."""
        ...

    def memory_bytes(self) -> tuple[int, int]:
        """(free, total) memory of the device in bytes."""
        ...
