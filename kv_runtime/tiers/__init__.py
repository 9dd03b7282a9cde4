"""Tiers below the KV pool: DDR, NVME. Whole blocks, named by content; bytes only, no torch here."""

from __future__ import annotations

from .block_io import BlockIO, NoBytesIO
from .fetch import Fetch, FetchCost, Fetcher
from .file_tier import FileTier
from .kv_tiers import KVTiers
from .migration import Watermarks
from .stats import TierStats
from .temperature import Temperature, TemperatureClassifier

__all__ = [
    "BlockIO",
    "Fetch",
    "FetchCost",
    "Fetcher",
    "FileTier",
    "KVTiers",
    "NoBytesIO",
    "Temperature",
    "TemperatureClassifier",
    "TierStats",
    "Watermarks",
]
