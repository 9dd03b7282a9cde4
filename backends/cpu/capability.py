"""What this CPU does fast, asked once."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch

from .kernels import KernelsUnavailable, load_library


@dataclass(frozen=True, slots=True)
class CPUCapability:
    """Which products are worth using. Any combination computes the right result, if the operations exist."""

    native_bfloat16: bool  # AVX512-bf16 or AMX: bfloat16 products in hardware, not emulated
    half_weights: bool  # FBGEMM's float32 x float16-weight product
    onednn: bool  # oneDNN's prepacked product
    kernels: bool = False  # our own, for AVX512-bf16: see `kernels.py`
    amx: bool = False  # and their products on AMX

    def packs_itself(self, weight: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether a product with this weight is made by our own kernels."""
        return self.kernels and dtype is torch.bfloat16 and weight.shape[1] % 2 == 0

    @classmethod
    def probe(cls, allow_kernels: bool = True) -> CPUCapability:
        """Ask torch, the processor and, unless told not to, our kernels."""
        onednn = bool(torch._C._has_mkldnn)
        supported = 0
        if allow_kernels:
            with suppress(KernelsUnavailable):
                supported = load_library().sagellm_supported()
        return cls(
            native_bfloat16=onednn
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
            half_weights="fbgemm" in torch.backends.quantized.supported_engines,
            onednn=onednn,
            kernels=bool(supported & 1),
            amx=bool(supported & 2),
        )
