"""Copies of KV blocks that the next step makes before anything else, and who keeps their sources until then."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...kv_runtime.cache import KVCache
    from .lease import BlockCopy


class BlockCopies:
    """Each source stays retained until the step with its copy has been launched: whoever writes to it comes after."""

    def __init__(self, kv: KVCache) -> None:
        self._kv = kv
        self._pending: list[BlockCopy] = []
        self._taken: list[int] = []  # sources of those that the newest plan took

    def __len__(self) -> int:
        """Those that no plan has taken."""
        return len(self._pending)

    def add(self, copy: BlockCopy) -> None:
        """Have a block copied; its source has been retained for it."""
        self._pending.append(copy)

    def take(self) -> list[tuple[int, int]]:
        """Those that a plan takes with it: (source, target)."""
        copies, self._pending = self._pending, []
        self._taken = [copy.source for copy in copies]
        return [(copy.source, copy.target) for copy in copies]

    def release_taken(self) -> None:
        """The newest plan has been launched."""
        if self._taken:
            self._kv.release(np.array(self._taken, np.int32))
            self._taken = []

    def drop_into(self, blocks: NDArray[np.int32]) -> None:
        """Whoever had these blocks does not need what was to be copied there."""
        if not self._pending:
            return
        owned = set(blocks.tolist())
        dropped = [copy for copy in self._pending if copy.target in owned]
        self._pending = [copy for copy in self._pending if copy.target not in owned]
        for copy in dropped:
            self._kv.release(np.array([copy.source], np.int32))
