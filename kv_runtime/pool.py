"""The books of the paged KV pool: who refers to which block. Nothing here touches a tensor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import KVCacheError

Int32Array = NDArray[np.int32]
Blocks = list[int] | Int32Array

NO_BLOCKS: Int32Array = np.empty(0, dtype=np.int32)
NO_BLOCKS.flags.writeable = False
FEW = 96  # below this many blocks a loop over a memoryview is faster than numpy's fixed costs


class ReferenceCounts:
    """One count per block. Both changes accept the same block several times and are all or nothing.

    Results name each block once; few of them come as a list, many as an array.
    """

    def __init__(self, num_blocks: int, held_by: str) -> None:
        self.counts: Int32Array = np.zeros(num_blocks, dtype=np.int32)
        self._held_by = held_by
        self._view = self.counts.data

    def add(self, blocks: Int32Array) -> Blocks:
        """Add one reference per entry and return the blocks that had none before.

        Raises:
            KVCacheError: an id is not of this pool.
        """
        if blocks.size > FEW:
            distinct, times = self._distinct(blocks)
            before = self.counts[distinct]
            self.counts[distinct] = before + times
            many: Int32Array = distinct[before == 0]
            return many
        view, fresh = self._view, []
        for block in self._listed(blocks):
            count = view[block]
            if count == 0:
                fresh.append(block)
            view[block] = count + 1
        return fresh

    def subtract(self, blocks: Int32Array) -> Blocks:
        """Take one reference per entry and return the blocks that have none left.

        Raises:
            KVCacheError: an id is not of this pool, or a block has fewer references than were to be taken.
        """
        if blocks.size > FEW:
            distinct, times = self._distinct(blocks)
            after = self.counts[distinct] - times
            if after.min() < 0:
                self._refuse(int(distinct[after < 0][0]))
            self.counts[distinct] = after
            many: Int32Array = distinct[after == 0]
            return many
        view, emptied = self._view, []
        listed = self._listed(blocks)
        for done, block in enumerate(listed):
            count = view[block] - 1
            if count < 0:
                for earlier in listed[:done]:
                    view[earlier] += 1
                self._refuse(block)
            view[block] = count
            if count == 0:
                emptied.append(block)
        return emptied

    def split(self, blocks: Blocks) -> tuple[Blocks, Blocks]:
        """Return those of the blocks that have references, and those that have none."""
        if isinstance(blocks, list):
            view = self._view
            if not blocks:
                return blocks, blocks
            return [block for block in blocks if view[block]], [block for block in blocks if not view[block]]
        held = self.counts[blocks] > 0
        return blocks[held], blocks[~held]

    def count_trailing_zeros(self, blocks: Int32Array) -> int:
        """Return how many blocks at the end, without a gap, have no reference."""
        view = self._view
        for count, block in enumerate(reversed(blocks.tolist())):
            if view[block]:
                return count
        return blocks.size

    def _listed(self, blocks: Int32Array) -> list[int]:
        listed: list[int] = blocks.tolist()
        if listed:
            self.check_range(min(listed), max(listed))
        return listed

    def _distinct(self, blocks: Int32Array) -> tuple[Int32Array, Int32Array]:
        distinct, times = np.unique(blocks, return_counts=True)
        self.check_range(distinct.item(0), distinct.item(-1))
        return distinct, times.astype(np.int32)

    def check_range(self, lowest: int, highest: int) -> None:
        if lowest < 0 or highest >= self.counts.size:
            wrong = lowest if lowest < 0 else highest
            raise KVCacheError(f"block {wrong} is not of this pool: its blocks are 0 to {self.counts.size - 1}")

    def _refuse(self, block: int) -> None:
        raise KVCacheError(
            f"block {block} was to lose more references than the {self.counts[block]} that {self._held_by}: "
            "release each block as often as it was allocated, retained or matched"
        )


class BlockPool:
    """Blocks 0 to `num_blocks - 1`, referenced by owners (sequences) and by the prefix tree.

    A block with no reference of either kind is free; one that only the tree refers to is *evictable*.
    `num_free`, `num_evictable` and `num_cached` (blocks the tree refers to) are kept up to date, O(1) to read.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise KVCacheError(f"a pool of {num_blocks} blocks holds nothing: give at least 1")
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.num_evictable = 0
        self.num_cached = 0
        self.owners = ReferenceCounts(num_blocks, "sequences hold")
        self.tree = ReferenceCounts(num_blocks, "the prefix tree holds")
        self._stack: Int32Array = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # the first num_free are free

    @property
    def free_blocks(self) -> Int32Array:
        """The free list, a view of [num_free]; its last entry is taken next."""
        return self._stack[: self.num_free]

    def take(self, count: int) -> Int32Array:
        """Turn `count <= num_free` free blocks into owned ones, each with one reference."""
        left = self.num_free - count
        blocks = self._stack[left : self.num_free][::-1].copy()
        self.num_free = left
        self.owners.counts[blocks] = 1
        return blocks

    def count_fitting(self, shared: list[Int32Array], counts: list[int]) -> int:
        """Return how many, from the first on, can have their `shared` blocks retained and `counts[i]` blocks taken."""
        joined = np.concatenate(shared)
        places = np.repeat(np.arange(len(counts)), [blocks.size for blocks in shared])
        distinct, first = np.unique(joined, return_index=True)
        no_longer_evictable = places[first[self.owners.counts[distinct] == 0]]
        needed = np.cumsum(counts + np.bincount(no_longer_evictable, minlength=len(counts)))
        return int(needed.searchsorted(self.num_free + self.num_evictable, side="right"))

    def check_referenced(self, blocks: Int32Array) -> None:
        """Raise KVCacheError if a block is free or not of this pool."""
        if not blocks.size:
            return
        self.owners.check_range(int(blocks.min()), int(blocks.max()))
        free = (self.owners.counts[blocks] == 0) & (self.tree.counts[blocks] == 0)
        if free.any():
            block = blocks[free.argmax()]
            raise KVCacheError(f"block {block} is free: commit a sequence before releasing its blocks")

    def retain(self, blocks: Int32Array) -> None:
        """Add one owner per entry.

        Raises:
            KVCacheError: a block is free or not of this pool. Nothing has changed.
        """
        fresh = self.owners.add(blocks)
        cached, free = self.tree.split(fresh)
        if len(free):
            self.owners.subtract(blocks)
            raise KVCacheError(f"block {free[0]} is free: allocate it instead of retaining it")
        self.num_evictable -= len(cached)

    def release(self, blocks: Int32Array) -> Blocks:
        """Take one owner per entry, free what nobody refers to, and return what only the tree refers to now.

        Raises:
            KVCacheError: a block has fewer owners than that, or is not of this pool. Nothing has changed.
        """
        emptied = self.owners.subtract(blocks)
        cached, unused = self.tree.split(emptied)
        self.num_evictable += len(cached)
        self._free(unused)
        return cached

    def cache(self, blocks: Int32Array) -> None:
        """Add one reference of the tree per entry; none of the blocks may be free (`check_referenced`)."""
        self.num_cached += len(self.tree.add(blocks))

    def uncache(self, blocks: Int32Array) -> None:
        """Take one reference of the tree per entry and free what nobody refers to."""
        emptied = self.tree.subtract(blocks)
        unused = self.owners.split(emptied)[1]
        self.num_cached -= len(emptied)
        self.num_evictable -= len(unused)
        self._free(unused)

    def uncache_all(self) -> int:
        """Take every reference of the tree; return how many blocks became free by it."""
        cached = np.flatnonzero(self.tree.counts).astype(np.int32)
        freed = cached[self.owners.counts[cached] == 0]
        self.tree.counts[cached] = 0
        self.num_cached = self.num_evictable = 0
        self._free(freed)
        return int(freed.size)

    def _free(self, blocks: Blocks) -> None:
        end = self.num_free + len(blocks)
        self._stack[self.num_free : end] = blocks
        self.num_free = end

    def check(self) -> None:
        """Compare the counters with the counts.

        Raises:
            KVCacheError: the free list is not exactly the unreferenced blocks, or a counter is off.
        """
        owners, tree = self.owners.counts, self.tree.counts
        free = self.free_blocks
        listed = np.bincount(free, minlength=self.num_blocks)
        for wrong, what in (
            (owners < 0, "has a negative number of owners"),
            (tree < 0, "has a negative number of references of the tree"),
            (listed > 1, "is on the free list more than once"),
            ((listed > 0) & (owners > 0), "is on the free list but a sequence owns it"),
            ((listed > 0) & (tree > 0), "is on the free list but the prefix tree refers to it"),
            ((listed == 0) & (owners == 0) & (tree == 0), "is referenced by nobody but not on the free list"),
        ):
            if wrong.any():
                block = int(wrong.argmax())
                raise KVCacheError(f"block {block} {what} (owners {owners[block]}, tree {tree[block]})")
        for name, kept, counted in (
            ("num_evictable", self.num_evictable, np.count_nonzero((owners == 0) & (tree > 0))),
            ("num_cached", self.num_cached, np.count_nonzero(tree)),
        ):
            if kept != counted:
                raise KVCacheError(f"{name} says {kept}, but {counted} blocks are so")
