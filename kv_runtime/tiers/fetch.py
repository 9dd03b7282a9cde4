"""Up: the blocks of a prompt that lower tiers hold are brought into the pool and entered into the prefix tree."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ...errors import KVCacheError
from ..cache import NO_MATCH, Commit
from ..pool import NO_BLOCKS
from .block_key import prefix_keys

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Lock

    from ..cache import KVCache
    from ..node import Namespace
    from ..pool import Int32Array
    from .block_io import BlockIO, Bytes, Rows
    from .block_key import BlockKey
    from .file_tier import FileTier
    from .host_tier import HostBlock, HostTier
    from .stats import TierCounters

log = logging.getLogger("sageLLM")

FETCH_TIMEOUT_S = 10.0  # where no estimate says how long computing the prompt would take
MAX_SHARE = 0.5  # of the pool, in blocks that are on their way up
MAX_ATTEMPTS = 3  # per prompt
_BATCH = 64  # blocks that are copied at once


class FetchCost(Protocol):
    """Estimates, in seconds; `accel/step_cost.py` has the real one."""

    def prompt_seconds(self, start: int, end: int) -> float:
        """To compute the prompt's tokens [start, end)."""
        ...

    def transfer_seconds(self, num_bytes: int, path: str) -> float:
        """To bring bytes up from `ddr` or `nvme`."""
        ...


class _Run:
    """One copy that is under way, for one prompt and for those that share the beginning of what it brings."""

    __slots__ = ("blocks", "deadline", "done", "first", "generation", "is_over", "keys", "match", "namespace",
                 "sources", "tokens")  # fmt: skip

    def __init__(
        self, wish: Fetch, first: int, sources: list[HostBlock | None], deadline: float, generation: int
    ) -> None:
        self.tokens = wish.tokens
        self.namespace = wish.namespace
        self.first = first
        self.keys = wish.keys[first : first + len(sources)]
        self.sources = sources  # None: in a file
        self.match = NO_MATCH
        self.blocks = NO_BLOCKS
        self.done = 0  # blocks
        self.deadline = deadline
        self.generation = generation  # of the pool: what is lost meanwhile is not entered
        self.is_over = False


class Fetch:
    """A prompt's wish for what lower tiers hold of its whole blocks: of the first `limit` of its `tokens` [T]."""

    __slots__ = ("attempts", "keys", "namespace", "run", "tokens")

    def __init__(self, tokens: Int32Array, namespace: Namespace, limit: int, block_size: int) -> None:
        self.tokens = tokens
        self.namespace = namespace
        self.keys = prefix_keys(namespace, tokens[: limit // block_size * block_size], block_size)
        self.attempts = MAX_ATTEMPTS
        self.run: _Run | None = None

    @property
    def is_under_way(self) -> bool:
        return self.run is not None and not self.run.is_over

    @property
    def deadline(self) -> float:
        """When it is no longer waited for; infinity if it is not."""
        return float("inf") if self.run is None or self.run.is_over else self.run.deadline


class Fetcher:
    """Starts fetches on the thread that asks, copies on the copier's. What fails is a miss: it is computed instead."""

    def __init__(
        self,
        kv: KVCache,
        io: BlockIO,
        host: HostTier,
        lock: Lock,
        files: FileTier | None,
        counters: TierCounters,
        flush: Callable[[], None],
        submit: Callable[[Callable[[], None]], object],
        cost: FetchCost | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_fetched: list[Callable[[], None]] = []
        self.cost = cost
        self._kv = kv
        self._io = io
        self._host = host
        self._lock = lock
        self._files = files
        self._counters = counters
        self._flush = flush
        self._submit = submit
        self._clock = clock
        self._coming: dict[bytes, _Run] = {}  # by digest of each block
        self._staging: Bytes | None = None

    @property
    def num_coming(self) -> int:
        """Blocks on their way up."""
        return len(self._coming)

    def is_coming(self, fetch: Fetch) -> bool:
        """Whether the prompt had better wait. Starts, or starts again, what it wishes for if there is room for it."""
        run = fetch.run
        if run is not None:
            if not run.is_over:
                if self._clock() < run.deadline:
                    return True
                fetch.attempts = 0
            fetch.run = None
        return fetch.attempts > 0 and self._start(fetch) and fetch.is_under_way

    def count_held(self, fetch: Fetch) -> int:
        """How many of the wish's blocks, from the first on, are in the pool or in lower tiers."""
        keys, size = fetch.keys, self._kv.block_size
        (cached,) = self._kv.count_cached([(fetch.tokens[: len(keys) * size + 1], fetch.namespace)], touch=False)
        first = cached // size
        with self._lock:
            return first + len(self._find(keys[first:]))

    # -- starting ----------------------------------------------------------------------------------------------------

    def _start(self, fetch: Fetch) -> bool:
        size, keys = self._kv.block_size, fetch.keys
        whole = len(keys) * size
        (cached,) = self._kv.count_cached([(fetch.tokens[: whole + 1], fetch.namespace)], touch=False)
        first = cached // size
        if first >= len(keys):
            fetch.attempts -= 1
            return False
        with self._lock:
            if self._joins(fetch, first):
                return True
            sources = self._find(keys[first:])
        count = min(len(sources), int(MAX_SHARE * self._kv.num_blocks) - len(self._coming))
        if not sources or not self._is_worth_it(first, sources):
            fetch.attempts -= 1
            return False
        if count <= 0:
            return self.cost is None and self._joins_any(fetch)  # with a cost: who knows what waiting would come to?
        return self._take_room(fetch, first, count)

    def _joins_any(self, fetch: Fetch) -> bool:
        """Whether there is a copy under way, whose end makes room for another: then the wish waits for that."""
        with self._lock:
            fetch.run = next(iter(self._coming.values()), None)
        return fetch.run is not None

    def _joins(self, fetch: Fetch, first: int) -> bool:
        """Whether the wish's first missing block is on its way up for somebody: then it waits for that."""
        run = self._coming.get(fetch.keys[first].digest)
        if run is not None:
            fetch.run = run
        return run is not None

    def _find(self, keys: list[BlockKey]) -> list[HostBlock | None]:
        """Where the keys' blocks are, up to the first that is nowhere."""
        found: list[HostBlock | None] = []
        for key in keys:
            block = self._host.find(key)
            if block is None and (self._files is None or key not in self._files):
                break
            found.append(block)
        return found

    def _is_worth_it(self, first: int, sources: list[HostBlock | None]) -> bool:
        return self._seconds_saved(first, sources) > 0

    def _seconds_saved(self, first: int, sources: list[HostBlock | None]) -> float:
        if self.cost is None:
            return FETCH_TIMEOUT_S
        size, each = self._kv.block_size, self._io.block_bytes
        in_files = sum(source is None for source in sources)
        saved = self.cost.prompt_seconds(first * size, (first + len(sources)) * size)
        for count, path in ((len(sources) - in_files, "ddr"), (in_files, "nvme")):
            if count:
                saved -= self.cost.transfer_seconds(count * each, path)
        return saved

    def _take_room(self, fetch: Fetch, first: int, count: int) -> bool:
        """Own the blocks that are there and those that are to come; False, and nothing is taken, if there is no room.

        What the tree gives up for them must not push out of host memory what is to come: that is pinned before.
        """
        kv = self._kv
        with self._lock:
            if self._joins(fetch, first):
                return True  # another thread was faster
            keys = takewhile(lambda key: key.digest not in self._coming, fetch.keys[first : first + count])
            sources = self._find([*keys])
            if not sources:
                return False
            seconds = min(FETCH_TIMEOUT_S, max(0.0, self._seconds_saved(first, sources)))
            run = _Run(fetch, first, sources, self._clock() + seconds, kv.generation)
            self._coming.update((key.digest, run) for key in run.keys)
            for source in sources:
                if source is not None:
                    self._host.pin(source)
        run.match = kv.match(fetch.tokens, fetch.namespace, first * kv.block_size, record=False)
        if run.match.tokens == first * kv.block_size:
            blocks = kv.allocate(len(sources))
            if blocks is not None:
                run.blocks = blocks
                fetch.run = run
                fetch.attempts -= 1
                self._counters.fetches += 1
                with suppress(RuntimeError):  # the engine is being shut down
                    self._submit(lambda: self._copy(run))
                    return True
        self._let_go(run)
        return False

    # -- on the copier thread ----------------------------------------------------------------------------------------

    def _copy(self, run: _Run) -> None:
        try:
            if self._clock() < run.deadline:  # else nobody waits any more
                self._flush()
                self._io.fence()
                while run.done < len(run.blocks):
                    self._copy_some(run)
        except Exception as error:
            missing = len(run.blocks) - run.done
            log.warning("KV of %d tokens could not be brought up: %s", missing * self._kv.block_size, error)
            self._counters.fetch_failures += missing
        finally:
            self._finish(run)

    def _copy_some(self, run: _Run) -> None:
        """Copy the next few blocks, all of one tier.

        Raises:
            OSError, KVCacheError: one of them cannot be read; those before it are there.
        """
        sources = run.sources[run.done : run.done + _BATCH]
        if sources[0] is None:
            self._copy_files(run, [*takewhile(lambda source: source is None, sources)])
            return
        rows = [source.row for source in takewhile(_is_filled, sources) if source is not None]
        if not rows:
            raise KVCacheError("a block was not saved")
        self._write(run, self._host.buffer, np.array(rows, np.int64))
        self._counters.bytes_from_host += len(rows) * self._io.block_bytes
        self._counters.host_hit_tokens += len(rows) * self._kv.block_size

    def _copy_files(self, run: _Run, sources: list[HostBlock | None]) -> None:
        assert self._files is not None
        if self._staging is None:
            self._staging = self._io.allocate(_BATCH)
        count = 0
        try:
            for key in run.keys[run.done : run.done + len(sources)]:
                self._files.read(key, self._staging[count])
                count += 1
        finally:
            self._write(run, self._staging, np.arange(count))
            self._counters.bytes_from_files += count * self._io.block_bytes
            self._counters.file_hit_tokens += count * self._kv.block_size

    def _write(self, run: _Run, buffer: Bytes, rows: Rows) -> None:
        if rows.size:
            self._io.write(run.blocks[run.done : run.done + rows.size], buffer, rows)
            run.done += rows.size

    def _finish(self, run: _Run) -> None:
        """Enter what has come into the tree, and let go of everything."""
        try:
            if run.done:
                blocks = np.concatenate([run.match.blocks, run.blocks[: run.done]])
                tokens = run.tokens[: (run.first + run.done) * self._kv.block_size]
                self._kv.commit_all([Commit(tokens, blocks, run.namespace, run.generation)])
        finally:
            self._let_go(run)
            self.tell()

    def tell(self) -> None:
        """Have those look again who wait for KV or for blocks."""
        for tell in self.on_fetched:
            tell()

    def _let_go(self, run: _Run) -> None:
        self._kv.release(np.concatenate([run.match.blocks, run.blocks]))
        with self._lock:
            for key in run.keys:
                self._coming.pop(key.digest, None)
            for source in run.sources:
                if source is not None:
                    self._host.unpin(source)
            run.is_over = True


def _is_filled(source: HostBlock | None) -> bool:
    return source is not None and source.filled
