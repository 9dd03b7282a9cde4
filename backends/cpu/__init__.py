"""The CPU: our own kernels where the processor multiplies bfloat16, else the best of torch's operations."""

from __future__ import annotations

import logging

import torch

from .avx512 import AVX512Backend
from .backend import CPUBackend
from .capability import CPUCapability
from .kernels import KernelsUnavailable, load_library

__all__ = ["AVX512Backend", "CPUBackend", "make_cpu_backend"]

log = logging.getLogger("sageLLM")


def make_cpu_backend(allow_kernels: bool = True) -> CPUBackend:
    """The fastest backend for this processor and this installation."""
    capability = CPUCapability.probe(allow_kernels)
    if capability.kernels:
        return AVX512Backend(capability)
    if allow_kernels and torch.cpu._is_avx512_bf16_supported():
        try:
            load_library()
        except KernelsUnavailable as reason:
            log.warning(
                "sageLLM's own CPU kernels are not used, torch's slower operations are: %s. With gcc installed, "
                "`pip install --force-reinstall --no-deps --no-cache-dir` of sageLLM compiles them; "
                "`backend: {cpu_kernels: torch}` silences this",
                reason,
            )
    return CPUBackend(capability)
