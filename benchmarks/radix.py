"""`sagellm bench radix`: what a lookup, an insert and an allocation take in a prefix tree that fills its pool."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..kv_runtime import Commit, KVCache, make_eviction_policy

if TYPE_CHECKING:
    from ..config import KVEviction
    from ..kv_runtime.pool import Int32Array

NAMESPACE = ("", "")
BLOCK_SIZE = 16
VOCAB_SIZE = 150_000
_SHARED = 16  # prompts begin alike in groups of so many
_PIECES = 100


@dataclass(slots=True)
class RadixTimes:
    """Seconds of single calls, by what was called."""

    calls: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, begin: float) -> None:
        self.calls.setdefault(name, []).append(time.perf_counter() - begin)

    def rows(self) -> list[list[str]]:
        """The name, and median, 99th percentile and longest in milliseconds."""
        quantiles = {name: 1e3 * np.quantile(times, (0.5, 0.99, 1)) for name, times in self.calls.items()}
        return [[name, *(f"{value:.3f}" for value in values)] for name, values in quantiles.items()]


def measure_radix(num_blocks: int, prompt_tokens: int, eviction: KVEviction, repeats: int) -> RadixTimes:
    """Fill a pool with prompts, of which groups share a third, then time single calls for prompts of `prompt_tokens`.

    Looked up are prompts that are cached whole, two thirds, a third or not at all, inserted ones that are not cached or
    whose first two thirds are. For an insert the pool, which is full, must evict as many blocks first. Of one prompt
    the whole is cached in many pieces, as others branch off it.
    """
    rng = np.random.default_rng(0)
    cache = KVCache(num_blocks, BLOCK_SIZE, policy=make_eviction_policy(eviction))
    per_prompt = -(-prompt_tokens // BLOCK_SIZE)
    prompts: list[Int32Array] = []
    while cache.num_free >= per_prompt:
        if len(prompts) % _SHARED == 0:
            shared = _random(rng, prompt_tokens // 3)
        prompts.append(np.concatenate([shared, _random(rng, prompt_tokens - shared.size)]))
        _store(cache, prompts[-1], RadixTimes())
    times = RadixTimes()
    split = prompts[-1]
    for end in np.linspace(1, prompt_tokens - 1, _PIECES, dtype=int).tolist():
        _store(cache, np.append(split[:end], np.int32(VOCAB_SIZE)), RadixTimes())
    for _ in range(repeats):
        begin = time.perf_counter()
        found = cache.match(split, NAMESPACE, split.size)
        times.note(f"lookup, whole cached in {_PIECES} nodes", begin)
        cache.release(found.blocks)
        known = prompts[int(rng.integers(len(prompts) - len(prompts) // 4, len(prompts)))]
        for name, part in (("whole", 1.0), ("two thirds", 2 / 3), ("a third", 1 / 3), ("nothing", 0.0)):
            kept = int(prompt_tokens * part)
            prompt = np.concatenate([known[:kept], _random(rng, prompt_tokens - kept)])
            begin = time.perf_counter()
            found = cache.match(prompt, NAMESPACE, prompt.size)
            times.note(f"lookup, {name} cached", begin)
            cache.release(found.blocks)
        for name, kept in (("nothing", 0), ("two thirds", 2 * prompt_tokens // 3)):
            _store(cache, np.concatenate([known[:kept], _random(rng, prompt_tokens - kept)]), times, f", {name} cached")
    return times


def _random(rng: np.random.Generator, count: int) -> Int32Array:
    return rng.integers(0, VOCAB_SIZE, count, dtype=np.int32)


def _store(cache: KVCache, prompt: Int32Array, times: RadixTimes, label: str = "") -> None:
    found = cache.match(prompt, NAMESPACE, prompt.size - 1, record=False)
    whole = found.tokens // BLOCK_SIZE
    begin = time.perf_counter()
    fresh = cache.allocate(-(-prompt.size // BLOCK_SIZE) - whole)
    times.note(f"allocate{label}", begin)
    assert fresh is not None
    cache.release(found.blocks[whole:])
    blocks = np.concatenate([found.blocks[:whole], fresh])
    begin = time.perf_counter()
    cache.commit_all([Commit(prompt, blocks, NAMESPACE)])
    times.note(f"insert{label}", begin)
    begin = time.perf_counter()
    cache.release(blocks)
    times.note(f"release{label}", begin)
