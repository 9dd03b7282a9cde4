"""Down: what the prefix tree gives up is kept in host memory, and from there in files."""

from __future__ import annotations

import logging
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from ...errors import KVCacheError
from ..block_hash import root_hash
from .block_key import chain_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..cache import KVCache
    from ..node import Node
    from ..pool import Int32Array
    from .block_io import BlockIO
    from .block_key import BlockKey
    from .file_tier import FileTier
    from .host_tier import HostBlock, HostTier
    from .stats import TierCounters

log = logging.getLogger("sageLLM")


class WriteBack:
    """Hears from the tree which blocks it gives up, and copies them down before anybody writes to them.

    `removed` only notes them, under the cache's lock. Whoever is about to write to blocks of the pool calls `flush`
    first: the device thread before each step, the copier before it brings blocks up.
    `on_saved` is told which blocks host memory has got, `on_unsaved` when it holds some that are to go on to files.
    """

    def __init__(
        self, io: BlockIO, host: HostTier, lock: Lock, files: FileTier | None, block_size: int, counters: TierCounters
    ) -> None:
        self.on_unsaved: Callable[[], None] = lambda: None
        self.on_saved: Callable[[list[bytes]], None] = lambda digests: None
        self._io = io
        self._host = host
        self._lock = lock  # of `host` and of what is pending
        self._files = files
        self._block_size = block_size
        self._counters = counters
        self._pending: list[tuple[HostBlock, int]] = []
        self._flushing = Lock()
        self.num_held = 0  # blocks of the pool, while they are copied down ahead of need
        self._keys: dict[int, BlockKey] = {}  # of the tree's full blocks, by id: changed under the cache's lock

    # -- the tree's listener -----------------------------------------------------------------------------------------

    def stored(self, node: Node, start: int) -> None:
        """Note the names of the blocks that are full by now: what comes after them is named by them."""
        size = self._block_size
        first, blocks = node.full_blocks(start, size)
        if not blocks:
            return
        begin = first * size
        parent = self._keys[node.block_before(begin, size)].digest if begin else root_hash(node.root_namespace())
        keys = chain_keys(parent, node.tokens_from(begin)[: len(blocks) * size], size)
        self._keys.update(zip(blocks, keys, strict=True))

    def removed(self, node: Node, start: int) -> None:
        _, blocks = node.full_blocks(start, self._block_size)
        self._note([self._keys.pop(block) for block in blocks], blocks)

    def cleared(self) -> None:
        """What is forgotten on purpose, or has been lost, is not saved."""
        self._keys.clear()
        with self._lock:
            pending, self._pending = self._pending, []
            for kept, _ in pending:
                self._host.unpin(kept)

    # -- saving ------------------------------------------------------------------------------------------------------

    def _note(self, keys: list[BlockKey], blocks: list[int]) -> None:
        """Have blocks saved that are not in host memory yet."""
        with self._lock:
            for key, block in zip(keys, blocks, strict=True):
                known = self._host.find(key)
                if known is not None:
                    self._host.touch(known)
                elif self._reserve(key, block) is None:
                    self._counters.lost_blocks += 1

    def _reserve(self, key: BlockKey, block: int) -> HostBlock | None:
        room = self._reserve_room(key)
        if room is not None:
            self._pending.append((room, block))
        return room

    def _reserve_room(self, key: BlockKey) -> HostBlock | None:
        return self._host.reserve(key, is_saved=self._files is not None and key in self._files)

    def save(self, keys: list[BlockKey], blocks: Int32Array) -> list[HostBlock]:
        """Keep these blocks, a prefix, in host memory until they are let go by `release`; as many as there is room for.

        They are copied by the next `flush`: until then nobody may write to them.
        """
        kept: list[HostBlock] = []
        with self._lock:
            for key, block in zip(keys, blocks.tolist(), strict=True):
                saved = self._host.find(key) or self._reserve(key, block)
                if saved is None:
                    break
                self._host.pin(saved)
                kept.append(saved)
        return kept

    def resident_digests(self) -> set[bytes]:
        """The hashes of the full blocks that the tree has."""
        return {key.digest for key in list(self._keys.values())}

    def unsaved(self) -> tuple[list[tuple[int, BlockKey]], int]:
        """The tree's full blocks that host memory does not have, each with its name; and how many it has in all."""
        blocks = list(self._keys.items())
        with self._lock:
            return [(block, key) for block, key in blocks if self._host.find(key) is None], len(blocks)

    def copy_down(self, kv: KVCache, wanted: list[tuple[int, BlockKey]]) -> int:
        """Copy blocks that are still the tree's to host memory; on the copier's thread, while steps go on.

        They are held meanwhile. Returns how many have become available by its end.
        """
        held, pending = [], []
        self.num_held = len(wanted)  # first: whoever misses them must find who has them
        for block, key in wanted:
            try:
                kv.retain(np.array([block], np.int32))
            except KVCacheError:  # given up meanwhile
                continue
            held.append(block)
            if self._keys.get(block) == key:  # and nobody writes to it as long as it is held
                with self._lock:
                    if self._host.find(key) is None and (room := self._reserve_room(key)) is not None:
                        pending.append((room, block))
        try:
            if pending:
                self._copy(pending)
        finally:
            freed = kv.release(np.array(held, np.int32))
            self.num_held = 0
        return freed

    def release(self, kept: list[HostBlock]) -> None:
        """Undo `save`."""
        with self._lock:
            for block in kept:
                self._host.unpin(block)

    def flush(self) -> None:
        """Copy what was given up so far; on return its blocks may be written to. What cannot be copied is lost."""
        with self._flushing:
            with self._lock:
                pending, self._pending = self._pending, []
            if pending:
                self._copy(pending)

    def _copy(self, pending: list[tuple[HostBlock, int]]) -> None:
        blocks = np.array([block for _, block in pending], np.int32)
        rows = np.array([kept.row for kept, _ in pending], np.int64)
        try:
            self._io.read(blocks, self._host.buffer, rows)
            copied = True
        except Exception:
            log.exception("%d KV blocks could not be saved to host memory", len(pending))
            copied = False
        with self._lock:
            for kept, _ in pending:
                kept.filled = copied
                self._host.unpin(kept)
        if copied:
            self._counters.bytes_to_host += len(pending) * self._io.block_bytes
            self.on_saved([kept.key.digest for kept, _ in pending])
        else:
            self._counters.lost_blocks += len(pending)
        self.on_unsaved()
