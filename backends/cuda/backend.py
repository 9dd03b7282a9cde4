"""A CUDA device, for now with the portable operations."""

from __future__ import annotations

from ..torch_ops import TorchBackend


class CUDABackend(TorchBackend):
    """`Backend` for one CUDA device."""

    name = "cuda"
