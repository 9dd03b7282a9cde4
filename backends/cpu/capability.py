"""What this CPU does fast, asked once."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class CPUCapability:
    """Which products are worth using. Any combination computes the right result, if the operations exist."""

    native_bfloat16: bool  # AVX512-bf16 or AMX: bfloat16 products in hardware, not emulated
    half_weights: bool  # FBGEMM's float32 x float16-weight product
    onednn: bool  # oneDNN's prepacked product

    @classmethod
    def probe(cls) -> CPUCapability:
        """Ask torch and the processor."""
        onednn = bool(torch._C._has_mkldnn)
        return cls(
            native_bfloat16=onednn
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
            half_weights="fbgemm" in torch.backends.quantized.supported_engines,
            onednn=onednn,
        )
