"""`sagellm bench kv-trace`: what share of a trace's KV blocks the prefix cache would have had, per size and policy.

A trace is that of Mooncake (https://github.com/kvcache-ai/Mooncake): JSON lines, each a request, whose `hash_ids`
name the blocks of 512 tokens of its prompt; equal ids are equal blocks after equal prefixes.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError
from ..kv_runtime import KVCache, Want, make_eviction_policy
from ..kv_runtime.eviction import ATTENTION_PARITY

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..config import KVEviction
    from ..kv_runtime.pool import Int32Array

PARITY = ATTENTION_PARITY / 512  # in the trace's blocks
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


def read_trace(path: Path) -> list[Int32Array]:
    """Return each request's block ids, numbered anew from 0, in the order of the trace.

    Raises:
        ConfigError: the file cannot be read, a line is no request of such a trace, or none asks for a block.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    requests = [_read_ids(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    joined = np.concatenate([np.empty(0, np.int64), *requests])
    if not joined.size:
        raise ConfigError(f'{path}: no block to look up: give a file with a line {{"hash_ids": [0, 1]}} per request')
    _, numbers = np.unique(joined, return_inverse=True)
    return np.split(numbers.astype(np.int32), np.cumsum([ids.size for ids in requests])[:-1])


def _read_ids(path: Path, number: int, line: bytes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    try:
        ids = json.loads(line)["hash_ids"]
        if not isinstance(ids, list) or not all(type(each) is int for each in ids):
            raise TypeError
        return np.array(ids, np.int64)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        found = line[:60].decode("utf-8", "replace")
        raise ConfigError(f'{path}:{number}: found {found}, write {{"hash_ids": [0, 1]}}, ids below 2^63') from error


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
