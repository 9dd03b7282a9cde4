"""Products with a weight that was packed once, at load.

Four packings, by element type and by what the weight's values allow:

- bfloat16 on AVX512-bf16 and AMX: our own layout and kernels, see `kernels.py`.
- bfloat16 on such a processor without our kernels: oneDNN's blocked layout, bfloat16 activations.
- half: FBGEMM's blocked layout of float16 weights, float32 activations and sums. Weights that came from a bfloat16 or
  float16 checkpoint survive it to float32's precision, so this is a float32 product that reads half the bytes.
- float32: oneDNN's blocked layout.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any

import torch

from ..torch_ops import PlainLinear
from .kernels import PackedLinear

if TYPE_CHECKING:
    from concurrent.futures import Future

    from torch import Tensor

    from ..base import Linear
    from .capability import CPUCapability

# Below this many elements the fixed cost of a packed product (about 30 us) is more than it saves.
SMALL_WEIGHT = 1 << 18
# oneDNN lays a weight out for this many rows: measured the best, or close to it, from 1 to 512.
PACKED_FOR_ROWS = 16
# A product of n terms in float32 is itself no better than about this, relative to the norms.
HALF_ERROR = 2.0**-20
CHECK_ELEMENTS = 1 << 20  # looked at together, so that the check stays in the cache


class OneDNNLinear:
    """A weight in oneDNN's layout; activations of the weight's type. A row's result does not depend on the others."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


class HalfLinear:
    """A float16 weight in FBGEMM's layout; float32 activations and sums."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FBGEMM announces values that it saturates; `fits_half` refused those
            self._packed: Any = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return out


def fits_half(weight: Tensor) -> bool:
    """Whether float16 holds a float32 weight to within the error of a float32 product (relative, sum of magnitudes)."""
    error = total = 0.0
    for rows in torch.split(weight, max(1, CHECK_ELEMENTS // weight.shape[1])):
        error += float(rows.half().float().sub_(rows).abs_().sum())
        total += float(rows.abs().sum())
    return error <= HALF_ERROR * total


@torch.inference_mode()
def pack_linear(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    capability: CPUCapability,
    threads: int = 1,
    gated: bool = False,
) -> Linear:
    """The fastest product for a weight [out, in] with activations of `dtype` on a processor of that capability."""
    if capability.packs_itself(weight, dtype):
        return PackedLinear(weight, bias, threads, gated, capability.amx)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if dtype is torch.float32 and weight.numel() >= SMALL_WEIGHT and capability.half_weights and fits_half(weight):
        return HalfLinear(weight, bias)
    packs = dtype is torch.float32 or (dtype is torch.bfloat16 and capability.native_bfloat16)
    if packs and weight.numel() >= SMALL_WEIGHT and capability.onednn:
        return OneDNNLinear(weight, bias)
    return PlainLinear(weight.contiguous(), bias)


class PendingLinear:
    """A product whose weight is still being packed on another thread; the first call waits for it."""

    def __init__(self, packing: Future[Linear]) -> None:
        self._packing = packing
        self._linear: Linear | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._linear is None:
            self._linear = self._packing.result()
        return self._linear(x)


class LinearPacker:
    """Packs weights on a few threads, since FBGEMM packs on one (about 15 ns an element).

    At most `2 * threads` unpacked weights are held; `pack` waits while there are more.
    """

    def __init__(self, capability: CPUCapability, threads: int) -> None:
        self._capability = capability
        self._num_threads = threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="pack-linear")
        self._slots = BoundedSemaphore(2 * threads)
        self._pending: list[Future[Linear]] = []

    def pack(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gated: bool = False) -> Linear:
        """Begin to pack, or pack at once where that is quick."""
        if weight.numel() < SMALL_WEIGHT:
            return pack_linear(weight, bias, dtype, self._capability, self._num_threads, gated)
        self._slots.acquire()
        future = self._threads.submit(
            pack_linear, weight, bias, dtype, self._capability, self._num_threads, gated
        )
        future.add_done_callback(lambda _: self._slots.release())
        self._pending.append(future)
        return PendingLinear(future)

    def wait(self) -> None:
        """Return when every weight is packed; raises what packing raised."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()
