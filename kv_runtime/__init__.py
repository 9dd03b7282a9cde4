"""The paged KV pool and the prefix tree over it: who owns which block, and what can be reused. No torch here."""

from __future__ import annotations

from ..config import KVGranularity
from .cache import Acquired, Commit, KVCache, KVCacheStats, PrefixMatch, Want

__all__ = ["Acquired", "Commit", "KVCache", "KVCacheStats", "KVGranularity", "PrefixMatch", "Want"]
