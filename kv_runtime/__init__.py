"""The paged KV pool and the prefix tree over it: who owns which block, and what can be reused. No torch here."""

from __future__ import annotations

from ..config import KVGranularity
from .cache import Commit, KVCache, KVCacheStats, PrefixMatch

__all__ = ["Commit", "KVCache", "KVCacheStats", "KVGranularity", "PrefixMatch"]
