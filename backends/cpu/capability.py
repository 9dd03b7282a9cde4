"""What this CPU does fast, asked once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .kernels import load_library, may_use_amx


@dataclass(frozen=True, slots=True)
class CPUCapability:
    """Which products are worth using. Any combination computes the right result, if the operations exist."""

    native_bfloat16: bool  # AVX512-bf16 or AMX: bfloat16 products in hardware, not emulated
    half_weights: bool  # FBGEMM's float32 x float16-weight product
    onednn: bool  # oneDNN's prepacked product
    avx512_bfloat16: bool = False
    kernels: bool = False  # our own, for AVX512-bf16: see `kernels.py`
    amx: bool = False  # and their products on AMX

    def packs_itself(self, weight: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether a product with this weight is made by our own kernels."""
        return self.kernels and dtype is torch.bfloat16 and weight.shape[1] % 2 == 0

    @classmethod
    def probe(cls) -> CPUCapability:
        """Ask torch and the processor."""
        onednn = bool(torch._C._has_mkldnn)
        avx512, amx = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
        return cls(
            native_bfloat16=onednn
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            and (avx512 or amx),
            half_weights="fbgemm" in torch.backends.quantized.supported_engines,
            onednn=onednn,
            avx512_bfloat16=avx512,
            kernels=avx512 and load_library() is not None,
            amx=may_use_amx(),
        )
