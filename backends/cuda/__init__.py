"""CUDA devices."""

from __future__ import annotations

from .backend import CUDABackend

__all__ = ["CUDABackend"]
