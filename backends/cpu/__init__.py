"""The CPU: packed weights, one attention call for all decoding sequences of a step."""

from __future__ import annotations

from .backend import CPUBackend

__all__ = ["CPUBackend"]
