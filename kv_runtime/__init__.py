"""The paged KV pool and the prefix tree over it: who owns which block, and what can be reused. No torch here."""

from __future__ import annotations

from ..config import KVEviction, KVGranularity
from .block_hash import block_hashes
from .cache import Acquired, Commit, KVCache, KVCacheStats, PrefixMatch, Want
from .events import KVEventLog
from .eviction import make_eviction_policy
from .listener import CacheListener

__all__ = [
    "Acquired",
    "CacheListener",
    "Commit",
    "KVCache",
    "KVCacheStats",
    "KVEventLog",
    "KVEviction",
    "KVGranularity",
    "PrefixMatch",
    "Want",
    "block_hashes",
    "make_eviction_policy",
]
