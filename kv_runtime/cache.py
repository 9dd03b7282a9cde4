"""The KV cache as the engine sees it: blocks to own, and prefixes to share."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import KVCacheError
from .block_times import BlockTimes, BlockWatch
from .eviction import LRUEviction
from .expiry import Expiry
from .integrity import check_tree
from .pool import NO_BLOCKS, BlockPool
from .radix_tree import RadixTree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .eviction import EvictionPolicy
    from .listener import CacheListener
    from .node import Namespace, Node
    from .pool import Int32Array


class PrefixMatch(NamedTuple):
    """A cached prefix: `tokens` tokens in `blocks` [ceil(tokens / block_size)], the last of which may be partly theirs.

    A block that is only partly theirs must be copied before anything is appended to it.
    """

    tokens: int
    blocks: Int32Array

    def whole_blocks(self, block_size: int) -> PrefixMatch:
        """Return the part of it that ends with a block."""
        full = self.tokens // block_size
        return PrefixMatch(full * block_size, self.blocks[:full])


NO_MATCH = PrefixMatch(0, NO_BLOCKS)


class Want(NamedTuple):
    """KV for a prompt `tokens` [T], of which at most the first `limit` may be cached ones, and `spare` blocks more."""

    tokens: Int32Array
    namespace: Namespace
    limit: int
    spare: int = 0


class Acquired(NamedTuple):
    """A cached prefix and, in `fresh`, own blocks from the one on that the prefix does not fill, then the spare ones.

    Of the match the last block is only shared until it has been copied, if the prefix ends inside it.
    """

    match: PrefixMatch
    fresh: Int32Array


class Commit(NamedTuple):
    """The KV of `tokens` [T], computed and stored in `blocks`; of an earlier `generation` of the cache, it is lost.

    With `pin` it is to be kept until `unpin`.
    """

    tokens: Int32Array
    blocks: Int32Array
    namespace: Namespace
    generation: int | None = None
    pin: bool = False


@dataclass(slots=True, frozen=True)
class KVCacheStats:
    """Counted since the cache was made (the first six), and as it is now (in blocks)."""

    queries: int
    queried_tokens: int
    hits: int
    hit_tokens: int
    committed_tokens: int
    evicted_blocks: int
    cached_blocks: int
    pinned_blocks: int
    evictable_blocks: int
    free_blocks: int
    total_blocks: int


class KVCache:
    """A pool of `num_blocks` blocks of `block_size` tokens and, over it, the prefixes that are reusable.

    A sequence keeps position p in its block `p // block_size` at offset `p % block_size`, and holds one reference on
    each of its blocks. Its life: `match` its prompt; own the whole blocks of the match as they are; `allocate` one
    more to copy a partly covered last block into and `release` the original; `allocate` the rest; compute; `commit`;
    `release`. Thread-safe: every method may be called from any thread.

    `policy` says which prefix is given up first, without one the least recently used; it serves this cache only.
    What nobody used for `ttl_s` seconds is forgotten, 0 is never: at the next lookup or allocation, by `clock`.
    With `enable_prefix_caching` or `share_across_requests` off, `match` finds nothing and `commit` inserts nothing.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        share_across_requests: bool = True,
        policy: EvictionPolicy | None = None,
        ttl_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an empty cache.

        Raises:
            KVCacheError: `num_blocks` or `block_size` is less than 1, or `ttl_s` is negative.
        """
        if ttl_s < 0:
            raise KVCacheError(f"a prefix cannot be kept for {ttl_s} s: give a positive time, or 0 to keep it for good")
        if block_size < 1:
            raise KVCacheError(f"a block of {block_size} tokens holds nothing: give at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.shares_prefixes = enable_prefix_caching and share_across_requests
        self.generation = 0  # grows when the contents of the pool are lost
        self._pool = BlockPool(num_blocks)
        expiry, watch = Expiry(ttl_s, clock) if ttl_s else None, BlockWatch(block_size, clock)
        self._tree = RadixTree(self._pool, block_size, policy or LRUEviction(), expiry, watch)
        self._expires = ttl_s > 0
        self._lock = threading.Lock()
        self._queries = self._queried_tokens = self._hits = self._hit_tokens = 0
        self._committed_tokens = self._evicted_blocks = 0

    def listen(self, listener: CacheListener) -> None:
        """Tell `listener` from now on what is stored and removed, and first what is there, as stored now."""
        with self._lock:
            for node in self._tree.nodes():
                listener.stored(node, node.start)
            self._tree.listeners.append(listener)

    def match(self, tokens: Int32Array, namespace: Namespace, limit: int, *, record: bool = True) -> PrefixMatch:
        """Return the longest cached prefix of `tokens` [T] of at most `limit` tokens, its blocks retained.

        The caller owns one reference on each block and must `release` them. `namespace` is (tenant, cache_salt):
        nothing is ever found across namespaces. `record` counts the query in the statistics and marks the prefix
        as just used.
        """
        tokens = np.asarray(tokens, dtype=np.int32)
        with self._lock:
            self._forget_expired()
            found, last = self._find(tokens, namespace, limit)
            if last and record:
                self._tree.use(last, found.tokens, hit=True)
            if found.tokens:
                self._pool.retain(found.blocks)
            if record:
                self._count_query(tokens, found.tokens)
        return found

    def _forget_expired(self) -> None:
        if self._expires:
            self._evicted_blocks += self._tree.forget_expired()

    def _find(self, tokens: Int32Array, namespace: Namespace, limit: int) -> tuple[PrefixMatch, Node | None]:
        if self.shares_prefixes and limit > 0:
            length, blocks, last = self._tree.match(tokens[:limit], namespace)
            return PrefixMatch(length, blocks), last
        return NO_MATCH, None

    def _count_query(self, tokens: Int32Array, hit: int) -> None:
        self._queries += 1
        self._queried_tokens += tokens.size
        self._hits += hit > 0
        self._hit_tokens += hit

    def count_cached(self, prompts: Iterable[tuple[Int32Array, Namespace]], *, touch: bool = True) -> list[int]:
        """Return how many tokens of each prompt are cached, its last one left out; `touch` marks them as just used."""
        if not self.shares_prefixes:
            return [0 for _ in prompts]
        with self._lock:
            self._forget_expired()
            return [self._tree.count(tokens[:-1], namespace, touch) for tokens, namespace in prompts]

    def commit(self, tokens: Int32Array, blocks: Int32Array, namespace: Namespace) -> int:
        """Make the KV of one run of tokens reusable, as `commit_all` does; return how many tokens are new.

        Raises:
            KVCacheError: as `commit_all`.
        """
        return self.commit_all([Commit(np.asarray(tokens, np.int32), np.asarray(blocks, np.int32), namespace)])

    def commit_all(self, commits: Sequence[Commit]) -> int:
        """Make computed KV reusable; return how many tokens are new.

        The caller owns the blocks and keeps its references. It may append to the last block, past the committed
        tokens, and commit the longer run later; it must never change the KV of a committed position.

        What is pinned stays cached until `unpin` or `clear`, and its blocks are not `available`: all of its
        ceil(T / block_size) blocks may come to `num_pinned`.

        Raises:
            KVCacheError: the blocks are fewer than the tokens need, free, or not of this pool. Nothing has changed.
        """
        size = self.block_size
        for tokens, blocks, *_ in commits:
            needed = -(-tokens.size // size)
            if blocks.size < needed:
                raise KVCacheError(f"{tokens.size} tokens need {needed} blocks of {size}, found {blocks.size}")
        if not self.shares_prefixes or not commits:
            return 0
        tree = self._tree
        with self._lock:
            commits = [commit for commit in commits if commit.generation in (None, self.generation)]
            self._pool.check_referenced(np.concatenate([NO_BLOCKS, *(commit.blocks for commit in commits)]))
            inserted = 0
            for tokens, blocks, namespace, _, pin in commits:
                inserted += tree.insert(tokens, blocks[: -(-tokens.size // size)], namespace)
                if pin and tokens.size:
                    tree.pin(tokens, namespace)
            tree.settle()
            self._committed_tokens += inserted
        return inserted

    def unpin(self, tokens: Int32Array, namespace: Namespace) -> bool:
        """Let go of a pinned prefix, given as it was committed; False if there is none. It stays cached for now."""
        with self._lock:
            return self._tree.unpin(np.asarray(tokens, dtype=np.int32), namespace)

    @property
    def num_pinned(self) -> int:
        """Blocks that pinned prefixes own."""
        return self._tree.pins.num_blocks

    def acquire(self, wants: Sequence[Want]) -> list[Acquired]:
        """Match and allocate for several prompts, in order, up to the first for which too few blocks exist.

        The caller owns one reference on each block. Matches count in the statistics and mark what they hit as just
        used, as in `match`; what does not fit takes nothing, and marks what it is to hit without a count.
        """
        if not wants:
            return []
        pool, size = self._pool, self.block_size
        with self._lock:
            self._forget_expired()
            found = [self._find(want.tokens, want.namespace, want.limit) for want in wants]
            matches = [match for match, _ in found]
            counts = [
                -(-want.tokens.size // size) - match.tokens // size + want.spare
                for want, match in zip(wants, matches, strict=True)
            ]
            fitting = pool.count_fitting([match.blocks for match in matches], counts)
            if not fitting and matches[0].tokens % size:
                # A partly covered block takes two while it is copied: a prompt that fills the pool goes without.
                matches[0] = matches[0].whole_blocks(size)
                fitting = pool.count_fitting([matches[0].blocks], counts[:1])
            for index, (match, last) in enumerate(found):
                if last:
                    self._tree.use(last, match.tokens, hit=index < fitting)
            pool.retain(np.concatenate([NO_BLOCKS, *(match.blocks for match in matches[:fitting])]))
            fresh = self._take(sum(counts[:fitting]))
            for want, match in zip(wants[:fitting], matches, strict=False):
                self._count_query(want.tokens, match.tokens)
        ends = [*accumulate(counts[:fitting])]
        return [
            Acquired(match, fresh[end - count : end]) for match, count, end in zip(matches, counts, ends, strict=False)
        ]

    def allocate(self, count: int) -> Int32Array | None:
        """Take `count` blocks, each with one reference, evicting as needed; None, and nothing taken, if too few exist.

        Raises:
            KVCacheError: `count` is negative.
        """
        if count < 0:
            raise KVCacheError(f"cannot allocate {count} blocks")
        pool = self._pool
        with self._lock:
            self._forget_expired()
            if count > pool.num_free + pool.num_evictable:
                return None
            return self._take(count)

    def _take(self, count: int) -> Int32Array:
        if count > self._pool.num_free:
            self._evicted_blocks += self._tree.evict(count)
        return self._pool.take(count)

    def retain(self, blocks: Int32Array) -> None:
        """Add one reference per entry.

        Raises:
            KVCacheError: a block is free or not of this pool. Nothing has changed.
        """
        blocks = np.asarray(blocks, dtype=np.int32)
        with self._lock:
            self._pool.retain(blocks)

    def release(self, blocks: Int32Array) -> int:
        """Take one reference per entry; blocks of several sequences may come in one call.

        Returns how many blocks have become `available`.

        Raises:
            KVCacheError: a block has fewer references than that, or is not of this pool. Nothing has changed.
        """
        blocks = np.asarray(blocks, dtype=np.int32)
        with self._lock:
            before = self._count_available()
            unowned = self._pool.release(blocks)
            if len(unowned):
                self._tree.unpark(unowned)
            return self._count_available() - before

    def available(self) -> int:
        """Return how many blocks `allocate` could give now: free ones and those that only the tree refers to."""
        with self._lock:
            return self._count_available()

    def _count_available(self) -> int:
        return self._pool.num_free + self._pool.num_evictable

    @property
    def num_free(self) -> int:
        """Blocks nobody refers to, the tree included."""
        return self._pool.num_free

    def usage(self) -> float:
        """Return the share, 0 to 1, of blocks that sequences or pins own; blocks that could be evicted do not count."""
        return 1.0 - self.available() / self.num_blocks

    def stats(self) -> KVCacheStats:
        """Return the counters at one moment."""
        with self._lock:
            return KVCacheStats(
                queries=self._queries,
                queried_tokens=self._queried_tokens,
                hits=self._hits,
                hit_tokens=self._hit_tokens,
                committed_tokens=self._committed_tokens,
                evicted_blocks=self._evicted_blocks,
                cached_blocks=self._pool.num_cached,
                pinned_blocks=self.num_pinned,
                evictable_blocks=self._pool.num_evictable,
                free_blocks=self._pool.num_free,
                total_blocks=self.num_blocks,
            )

    def block_times(self) -> BlockTimes:
        """Return how long blocks lived, rested and waited so far, in seconds by `clock`."""
        with self._lock:
            return BlockTimes.merged([self._tree.watch.times])

    def clear(self) -> None:
        """Forget every prefix, pinned or not. Blocks without an owner become free; the others stay with theirs."""
        with self._lock:
            self._evicted_blocks += self._tree.clear()

    def lose(self) -> None:
        """The contents of all blocks are gone: forget every prefix, and refuse commits of what was computed before."""
        with self._lock:
            self.generation += 1
            self._evicted_blocks += self._tree.clear()

    def check_integrity(self, owners: Iterable[Int32Array] | None = None) -> None:
        """Recount everything, O(blocks + cached tokens), under the lock.

        `owners` are the block arrays that sequences hold, all of them; None leaves their counts unverified.

        Raises:
            KVCacheError: naming the block or tree node whose books are wrong, and how.
        """
        with self._lock:
            self._pool.check()
            check_tree(self._tree)
            if owners is None:
                return
            held = self._tree.pins.counts.astype(np.int64)
            for blocks in owners:
                np.add.at(held, blocks, 1)
            counted = self._pool.owners.counts
            wrong = held != counted
            if wrong.any():
                block = int(wrong.argmax())
                raise KVCacheError(
                    f"block {block} has {counted[block]} owners, but {held[block]} were declared: "
                    + ("a release is missing" if counted[block] > held[block] else "it was released too often")
                )
