"""The CPU: our own kernels where the processor multiplies bfloat16, else the best of torch's operations."""

from __future__ import annotations

import logging

from .avx512 import AVX512Backend
from .backend import CPUBackend
from .capability import CPUCapability

__all__ = ["AVX512Backend", "CPUBackend", "make_cpu_backend"]

log = logging.getLogger("sageLLM")


def make_cpu_backend() -> CPUBackend:
    """The fastest backend for this processor and this installation."""
    capability = CPUCapability.probe()
    if capability.kernels:
        return AVX512Backend(capability)
    if capability.avx512_bfloat16:
        log.warning(
            "the CPU kernels were not compiled when sageLLM was installed; torch's operations are used, which are "
            "slower: install a C compiler (gcc or clang) and then sageLLM again"
        )
    return CPUBackend(capability)
