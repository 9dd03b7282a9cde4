"""What the prefix cache stores and removes, as events that somebody may read later, in whole blocks."""

from __future__ import annotations

import time
from collections import deque
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from ..records import KVEvent, KVEventKind
from .block_hash import chain_hashes, root_hash
from .node import NO_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from .node import Namespace, Node
    from .pool import Int32Array

_NO_ONE = ("", "")


class _Noted(NamedTuple):
    """An event before anybody has read it."""

    kind: KVEventKind
    seq: int
    at: float
    namespace: Namespace = _NO_ONE
    start: int = 0
    parent: bytes = b""
    digests: tuple[bytes, ...] = ()
    tokens: Int32Array = NO_TOKENS
    tier: str = "hbm"

    @property
    def weight(self) -> int:
        return max(1, len(self.digests))


class KVEventLog:
    """A listener of one cache that keeps what it hears until it is read: of the oldest no more than `max_blocks`.

    `wake` is called after each event, perhaps under the cache's lock, from any thread. What was not read in time is
    lost, and the next event that is read says how many that were. A block of a prefix that ends inside it makes no
    event until it is full. Costs a hash per stored block.
    """

    def __init__(self, num_blocks: int, block_size: int, max_blocks: int, worker: int = 0) -> None:
        self.wake: Callable[[], None] = lambda: None
        self.lost = 0  # events, so far
        self._worker = worker
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._digests = [b""] * num_blocks  # of each full block that is cached
        self._waiting: deque[_Noted] = deque()
        self._waiting_blocks = 0
        self._told_lost = 0
        self._last_lost = -1
        self._seq = 0
        self._lock = Lock()

    # -- what the cache tells -----------------------------------------------------------------------------------------

    def stored(self, node: Node, start: int) -> None:
        size = self._block_size
        first, blocks = node.full_blocks(start, size)
        if not blocks:
            return
        begin, namespace = first * size, node.root_namespace()
        tokens = node.tokens_from(begin)[: len(blocks) * size]
        parent = self._digests[node.block_before(begin, size)] if begin else root_hash(namespace)
        digests = chain_hashes(parent, tokens, size)
        for block, digest in zip(blocks, digests, strict=True):
            self._digests[block] = digest
        self._note(KVEventKind.STORED, namespace, begin, parent if begin else b"", digests, tokens)

    def removed(self, node: Node, start: int) -> None:
        first, blocks = node.full_blocks(start, self._block_size)
        if blocks:
            digests = [self._digests[block] for block in blocks]
            self._note(KVEventKind.REMOVED, node.root_namespace(), first * self._block_size, b"", digests, NO_TOKENS)

    def cleared(self) -> None:
        self._note(KVEventKind.CLEARED, _NO_ONE, 0, b"", [], NO_TOKENS)

    def moved(self, digests: list[bytes], tier: str) -> None:
        """These full blocks are in `tier` now, too."""
        self._note(KVEventKind.MOVED, _NO_ONE, 0, b"", digests, NO_TOKENS, tier)

    def dropped(self, digests: list[bytes], tier: str) -> None:
        """They are no longer in that lower tier."""
        self._note(KVEventKind.REMOVED, _NO_ONE, 0, b"", digests, NO_TOKENS, tier)

    def _note(
        self,
        kind: KVEventKind,
        namespace: Namespace,
        start: int,
        parent: bytes,
        digests: list[bytes],
        tokens: Int32Array,
        tier: str = "hbm",
    ) -> None:
        with self._lock:
            noted = _Noted(kind, self._seq, time.time(), namespace, start, parent, tuple(digests), tokens, tier)
            self._seq += 1
            self._waiting.append(noted)
            self._waiting_blocks += noted.weight
            while self._waiting_blocks > self._max_blocks:
                oldest = self._waiting.popleft()
                self._waiting_blocks -= oldest.weight
                self._last_lost = oldest.seq
                self.lost += 1
        self.wake()

    # -- what the reader asks -----------------------------------------------------------------------------------------

    def take(self) -> list[KVEvent]:
        """Return the events that wait, in order, from any one thread."""
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
            self._waiting_blocks = 0
            lost, self._told_lost = self.lost - self._told_lost, self.lost
            last_lost = self._last_lost
        events = [
            KVEvent(
                noted.kind,
                noted.seq,
                noted.at,
                tenant=noted.namespace[0],
                start=noted.start,
                parent_hash=noted.parent.hex() or None,
                block_hashes=[digest.hex() for digest in noted.digests],
                tokens=noted.tokens,
                block_size=self._block_size,
                tier=noted.tier,
                worker=self._worker,
            )
            for noted in waiting
        ]
        if lost:
            at = events[0].at if events else time.time()
            events.insert(0, KVEvent(KVEventKind.LOST, last_lost, at, lost=lost, tokens=NO_TOKENS, worker=self._worker))
        return events
