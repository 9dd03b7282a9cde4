"""Moves blocks ahead of need: cold ones are copied down before the pool has to give them up, hot ones come up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .fetch import Fetch

if TYPE_CHECKING:
    from ..cache import KVCache
    from ..node import Namespace
    from .block_key import BlockKey
    from .fetch import Fetcher
    from .temperature import TemperatureClassifier
    from .write_back import WriteBack

_BATCH = 64  # blocks that are copied at once


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Shares of a tier's blocks, 0 to 1: demotion begins over `high` and ends at `low`, promotion ends at `promote`.

    What a lower tier has as well does not count for demotion: it can be given up at any time.
    """

    high: float = 0.9
    low: float = 0.8
    promote: float = 0.5


class Migration:
    """One pass at a time, on the copier's thread."""

    def __init__(
        self,
        kv: KVCache,
        write_back: WriteBack,
        fetcher: Fetcher,
        classifier: TemperatureClassifier,
        watermarks: Watermarks,
    ) -> None:
        self.classifier = classifier
        self._kv = kv
        self._write_back = write_back
        self._fetcher = fetcher
        self._watermarks = watermarks
        self._promoting: list[Fetch] = []
        self._namespaces: dict[bytes, Namespace] = {}  # of what is not cold, by their root's hash

    def access(self, wish: Fetch) -> None:
        """A prompt asks for these blocks now."""
        if wish.keys:
            self._namespaces[wish.keys[0].parent] = wish.namespace
            self.classifier.access(wish.keys)

    def usage(self) -> float:
        """The share of the pool's blocks in use that no lower tier has."""
        unsaved, in_tree = self._write_back.unsaved()
        return self._used(len(unsaved), in_tree) / self._kv.num_blocks

    def _used(self, unsaved: int, in_tree: int) -> int:
        return self._kv.num_blocks - self._kv.num_free - (in_tree - unsaved)

    def run(self) -> None:
        """Look at everything once."""
        self._forget_cold()
        self._demote()
        self._promote()

    def _forget_cold(self) -> None:
        self.classifier.forget_cold()
        parents = {key.parent for key in self.classifier.known_keys()}
        for root in [*self._namespaces]:
            if root not in parents:
                self._namespaces.pop(root)

    def _demote(self) -> None:
        kv, marks = self._kv, self._watermarks
        if kv.num_blocks - kv.num_free <= marks.high * kv.num_blocks:
            return
        unsaved, in_tree = self._write_back.unsaved()
        used = self._used(len(unsaved), in_tree)
        if used <= marks.high * kv.num_blocks:
            return
        unsaved.sort(key=lambda pair: self.classifier.last_access(pair[1].digest))
        wanted = unsaved[: used - int(marks.low * kv.num_blocks)]
        for begin in range(0, len(wanted), _BATCH):
            if self._write_back.copy_down(kv, wanted[begin : begin + _BATCH]):
                self._fetcher.tell()

    def _promote(self) -> None:
        """Start fetches of hot prefixes that are not in the pool, as far as there is room."""
        kv = self._kv
        self._promoting = [fetch for fetch in self._promoting if fetch.is_under_way]
        room = int(self._watermarks.promote * kv.num_blocks) - (kv.num_blocks - kv.num_free)
        if room <= 0:
            return
        resident = self._write_back.resident_digests()
        missing = [key for key in self.classifier.hot_keys() if key.digest not in resident]
        inner = {key.parent for key in missing}
        for key in missing:
            if key.digest in inner:  # comes up with what continues it
                continue
            prefix = self._prefix(key)
            if prefix is None or len(prefix[1]) // kv.block_size > room:
                continue
            namespace, tokens = prefix
            fetch = Fetch(tokens, namespace, len(tokens), kv.block_size)
            if self._fetcher.is_coming(fetch):
                self._promoting.append(fetch)
                room -= len(fetch.keys)

    def _prefix(self, key: BlockKey) -> tuple[Namespace, np.ndarray[tuple[int], np.dtype[np.int32]]] | None:
        """Who may use a block, and all tokens up to its end; None if part of them is not known any more."""
        runs = [key.tokens]
        while (namespace := self._namespaces.get(key.parent)) is None:
            parent = self.classifier.key(key.parent)
            if parent is None:
                return None
            key = parent
            runs.append(key.tokens)
        return namespace, np.frombuffer(b"".join(reversed(runs)), "<i4").astype(np.int32)
