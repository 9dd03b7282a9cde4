"""Devices: what they can do (`base`), which one to use (`detect_backend`), and how each does it (`cpu/`, `cuda/`)."""

from __future__ import annotations

from .base import Backend, Linear, StepLayout
from .detection import detect_backend

__all__ = ["Backend", "Linear", "StepLayout", "detect_backend"]
