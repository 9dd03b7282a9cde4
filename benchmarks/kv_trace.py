"""`sagellm bench kv-trace`: what share of a trace's KV blocks the prefix cache would have had, per size and policy.

What a trace is says `traces.py`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError
from ..kv_runtime import KVCache, Want, make_eviction_policy
from ..kv_runtime.eviction import ATTENTION_PARITY
from .traces import HASH_BLOCK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..config import KVEviction
    from ..kv_runtime.pool import Int32Array

PARITY = ATTENTION_PARITY / HASH_BLOCK  # in the trace's blocks
NAMESPACE = ("", "")


@dataclass(frozen=True, slots=True)
class Replay:
    """Blocks that were hit and looked up; `seconds` is for all lookups, each with its evictions and its insert.

    `saved_time` is the share, 0 to 1, of the time to compute all prompts that hits save, as policy `cost` estimates it.
    """

    lookups: int
    hit_blocks: int
    looked_up_blocks: int
    saved_time: float
    seconds: float

    @property
    def hit_rate(self) -> float:
        return self.hit_blocks / self.looked_up_blocks

    @property
    def lookups_per_second(self) -> float:
        return self.lookups / self.seconds


def replay(requests: Sequence[Int32Array], num_blocks: int | None, eviction: KVEviction) -> Replay:
    """Look up each request's blocks, one after the other, then insert them; a trace's block is a block of one token.

    `num_blocks` None is as many as the trace could fill.

    Raises:
        ConfigError: `num_blocks` does not hold the longest request.
    """
    longest, total = max(ids.size for ids in requests), sum(ids.size for ids in requests)
    if num_blocks is not None and num_blocks < longest:
        raise ConfigError(f"{num_blocks} blocks do not hold the longest request of the trace, give at least {longest}")
    policy = make_eviction_policy(eviction, PARITY)
    cache = KVCache(num_blocks or total, block_size=1, policy=policy)
    saved = 0.0
    start = time.perf_counter()
    for ids in requests:
        ((match, fresh),) = cache.acquire([Want(ids, NAMESPACE, limit=ids.size)])
        saved += _prefill_time(match.tokens)
        blocks = np.concatenate([match.blocks, fresh])
        cache.commit(ids, blocks, NAMESPACE)
        cache.release(blocks)
    seconds = time.perf_counter() - start
    stats = cache.stats()
    saved /= sum(_prefill_time(ids.size) for ids in requests)
    return Replay(stats.queries, stats.hit_tokens, stats.queried_tokens, saved, seconds)


def _prefill_time(blocks: int) -> float:
    """In the time that the linear layers take for a block."""
    return blocks + blocks**2 / (2 * PARITY)
