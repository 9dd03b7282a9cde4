"""Swap: a preempted row's KV waits in a lower tier instead of being computed again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...kv_runtime.tiers import Fetch, KVTiers
    from ...kv_runtime.tiers.host_tier import HostBlock
    from .lease import Namespace


class Swap:
    """The whole blocks of preempted rows, by slot: kept in DDR until the row resumes or ends.

    They come up through the prefix tree, as a prompt's do; what is lost on the way is computed. Belongs to the thread
    that steps.
    """

    def __init__(self, tiers: KVTiers) -> None:
        self._tiers = tiers
        self._kept: dict[int, list[HostBlock]] = {}
        self._fetches: dict[int, Fetch] = {}

    def save(self, slot: int, tokens: NDArray[np.int32], blocks: NDArray[np.int32], namespace: Namespace) -> None:
        """Keep the KV of `tokens` [T], which lies in `blocks`: they are copied before anybody else writes to them."""
        self._kept[slot] = self._tiers.save(tokens, blocks, namespace)

    def is_coming(
        self, slot: int, tokens: NDArray[np.int32], namespace: Namespace, limit: int, *, has_room: bool
    ) -> bool:
        """Whether the row had better wait: what was kept of its first `limit` tokens is on its way up.

        It starts when there is room for the whole row.
        """
        if slot not in self._kept:
            return False
        fetch = self._fetches.get(slot)
        if not has_room and (fetch is None or not fetch.is_under_way):
            return False
        if fetch is None:
            fetch = self._fetches[slot] = self._tiers.wish(tokens, namespace, limit)
        return self._tiers.fetcher.is_coming(fetch)

    def forget(self, slot: int) -> None:
        """The row runs again, or never will."""
        self._fetches.pop(slot, None)
        kept = self._kept.pop(slot, None)
        if kept:
            self._tiers.release(kept)
