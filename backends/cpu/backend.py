"""The CPU as a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..torch_ops import TorchBackend

if TYPE_CHECKING:
    from ...config import DType


class CPUBackend(TorchBackend):
    """`Backend` for the CPU."""

    name = "cpu"

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def compute_dtype(self, dtype: DType, checkpoint: torch.dtype) -> torch.dtype:
        return torch.float32
