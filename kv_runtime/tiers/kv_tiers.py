"""The tiers below the KV pool, as the engine sees them."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

from ...errors import KVCacheError
from .block_key import prefix_keys
from .demotion import Demotion
from .export import export_blocks
from .fetch import Fetch, Fetcher
from .host_tier import HostTier
from .migration import Migration, Watermarks
from .stats import TierCounters, TierStats
from .write_back import WriteBack

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..cache import KVCache
    from ..events import KVEventLog
    from ..node import Namespace
    from ..pool import Int32Array
    from .block_io import BlockIO
    from .fetch import FetchCost
    from .file_tier import FileTier
    from .host_tier import HostBlock
    from .temperature import TemperatureClassifier

    Submit = Callable[[Callable[[], None]], object]

log = logging.getLogger("sageLLM")

PERSIST_S = 10.0  # how long closing may take
PERSIST_BATCH = 64  # blocks that are copied at once then
MIGRATION_INTERVAL_S = 1.0
DEFAULT_WATERMARKS = Watermarks()


class KVTiers:
    """DDR, `host_blocks` of it, and below it perhaps files: an extension of `kv`'s prefix tree, in whole blocks.

    What the tree gives up goes down, what a prompt wishes for comes up. Copies are made on one thread of its own, but
    for what is given up and not saved yet: that is copied by whoever is about to write to it, who calls `flush` first.
    With a `classifier` blocks migrate ahead of need.
    Every method may be called from any thread. `submit` runs a job elsewhere, by default on that thread.
    """

    def __init__(
        self,
        kv: KVCache,
        io: BlockIO,
        host_blocks: int,
        files: FileTier | None = None,
        *,
        cost: FetchCost | None = None,
        watermarks: Watermarks = DEFAULT_WATERMARKS,
        classifier: TemperatureClassifier | None = None,
        submit: Submit | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kv = kv
        self._copier = None if submit else ThreadPoolExecutor(1, thread_name_prefix="sagellm-kv-copier")
        self._submit_job = submit or self._copier.submit  # type: ignore[union-attr]
        self._lock = Lock()
        self._host = HostTier(io.allocate(host_blocks))
        self._files = files
        self._counters = TierCounters()
        self._io = io
        self._clock = clock
        self._is_demoting = False
        self._on_file_deleted: Callable[[bytes], None] = lambda digest: None
        self.write_back = WriteBack(io, self._host, self._lock, files, kv.block_size, self._counters)
        self.fetcher = Fetcher(
            kv, io, self._host, self._lock, files, self._counters, self.write_back.flush, self._submit, cost, clock
        )
        self._demotion = None
        if files is not None:
            self._demotion = Demotion(
                io, self._host, self._lock, files, self._counters, watermarks, kv.num_blocks, clock
            )
            files.on_deleted.append(self._file_deleted)
            self.write_back.on_unsaved = self._demote_soon
        self.migration = None
        self._next_pass = clock()
        if classifier is not None:
            self.migration = Migration(kv, self.write_back, self.fetcher, classifier, watermarks)
        kv.listen(self.write_back)

    def listen(self, log: KVEventLog) -> None:
        """Tell `log` from now on what goes to lower tiers and what is dropped there."""
        self.write_back.on_saved = lambda digests: log.moved(digests, "ddr")
        self._host.on_forgotten = lambda digest: log.dropped([digest], "ddr")
        if self._demotion is not None:
            self._demotion.on_written = lambda digest: log.moved([digest], "nvme")
        self._on_file_deleted = lambda digest: log.dropped([digest], "nvme")

    def wish(self, tokens: Int32Array, namespace: Namespace, limit: int) -> Fetch:
        """Say that a prompt could use what lower tiers hold of its first `limit` tokens; `fetcher` starts it."""
        fetch = Fetch(tokens, namespace, limit, self._kv.block_size)
        self.note(fetch)
        return fetch

    def note(self, wish: Fetch) -> None:
        """A prompt, perhaps one that has wished elsewhere before, may have this brought up here."""
        if self.migration is not None:
            self.migration.access(wish)
            self._migrate_in_time(self.migration)

    def flush(self, *, wait: bool = False) -> None:
        """Save what the tree gave up so far. On return the device that computes may write to its blocks; others, too,
        if it was to `wait` until the copies are made."""
        self.write_back.flush()
        if wait:
            self._io.synchronize()
        if self.migration is not None:
            self._migrate_in_time(self.migration)

    @property
    def next_pass(self) -> float:
        """When the next `flush` has blocks migrate, in seconds of the clock; infinity where none ever do."""
        return float("inf") if self.migration is None else self._next_pass

    def _migrate_in_time(self, migration: Migration) -> None:
        """Every second in which something happens, have the copier look at what lies where."""
        now = self._clock()
        if now >= self._next_pass:
            self._next_pass = now + MIGRATION_INTERVAL_S
            with suppress(RuntimeError):  # the engine is being shut down
                self._submit(migration.run)

    def save(self, tokens: Int32Array, blocks: Int32Array, namespace: Namespace) -> list[HostBlock]:
        """Keep the whole blocks of a computed run until `release`, as many as fit, from the first on."""
        keys = prefix_keys(namespace, tokens, self._kv.block_size)
        return self.write_back.save(keys, blocks[: len(keys)])

    def release(self, kept: list[HostBlock]) -> None:
        """They need not be kept any longer."""
        self.write_back.release(kept)

    @property
    def num_held(self) -> int:
        """Blocks of the pool that copies hold now: nobody's, and not available."""
        return self.fetcher.num_coming + self.write_back.num_held

    @property
    def has_files(self) -> bool:
        return self._files is not None

    def export(self, tokens: Int32Array, blocks: Int32Array, namespace: Namespace) -> int:
        """Write the whole blocks of a computed run, which the caller owns, to files; return how many are missing there.

        Takes as long as it takes: not for the flow's thread.
        """
        keys = prefix_keys(namespace, tokens, self._kv.block_size)
        if self._files is None:
            return len(keys)
        return export_blocks(keys, blocks[: len(keys)], self._io, self._files, self._counters)

    def discover(self, wishes: list[Fetch]) -> None:
        """Look on the disk for what prompts wish: another process may have written it. Not for the flow's thread."""
        files = self._files
        if files is not None:
            for wish in wishes:
                all(map(files.discover, wish.keys))  # up to the first that is not there

    def close(self) -> None:
        """Finish what is under way, end the copier's thread, and write what files do not have yet, as time allows.

        Nobody may use the pool any more.
        """
        self.write_back.on_unsaved = lambda: None
        if self._copier is not None:
            self._copier.shutdown()
        if self._demotion is not None and self._files is not None:
            self._persist(self._demotion, self._files, self._clock() + PERSIST_S)

    def _persist(self, demotion: Demotion, files: FileTier, deadline: float) -> None:
        """What DDR has goes first, then what the tree has: prefixes before what continues them, pinned ones too."""
        self.write_back.flush()
        demotion.run(deadline, everything=True)
        unsaved, _ = self.write_back.unsaved()
        wanted = [(block, key) for block, key in unsaved if key not in files]
        count = min(PERSIST_BATCH, self._host.capacity)
        for begin in range(0, len(wanted), count):
            if self._clock() >= deadline or not files.is_writable:
                return
            self.write_back.copy_down(self._kv, wanted[begin : begin + count])
            demotion.run(deadline, everything=True)

    def _submit(self, job: Callable[[], None]) -> None:
        self._submit_job(lambda: _guarded(job))

    def _demote_soon(self) -> None:
        demotion = self._demotion
        if demotion is None or not demotion.is_due:
            return
        with self._lock:
            if self._is_demoting:
                return
            self._is_demoting = True
        self._submit(self._demote)

    def _demote(self) -> None:
        assert self._demotion is not None
        with self._lock:
            self._is_demoting = False
        self._demotion.run()

    def _file_deleted(self, digest: bytes) -> None:
        self._on_file_deleted(digest)
        with self._lock:
            self._host.mark_unsaved(digest)

    def stats(self) -> TierStats:
        """Return the counters at one moment."""
        counters, files = self._counters, self._files
        with self._lock:
            return TierStats(
                ddr_hit_tokens=counters.host_hit_tokens,
                nvme_hit_tokens=counters.file_hit_tokens,
                bytes_hbm_to_ddr=counters.bytes_to_host,
                bytes_ddr_to_nvme=counters.bytes_to_files,
                bytes_ddr_to_hbm=counters.bytes_from_host,
                bytes_nvme_to_hbm=counters.bytes_from_files,
                fetches=counters.fetches,
                fetch_failures=counters.fetch_failures,
                lost_blocks=counters.lost_blocks + self._host.lost_blocks,
                unexported_blocks=counters.unexported_blocks,
                ddr_blocks=len(self._host),
                ddr_capacity=self._host.capacity,
                nvme_blocks=0 if files is None else len(files),
                nvme_capacity=0 if files is None else files.capacity,
                fetching_blocks=self.fetcher.num_coming,
            )

    def check_integrity(self) -> None:
        """Recount the books.

        Raises:
            KVCacheError: naming what is wrong; also if something is pinned, which is so while copies are under way.
        """
        self.flush()
        with self._lock:
            problem = self._host.check()
            pinned = sum(block.pins > 0 for block in self._host.blocks())
        if problem is None and pinned:
            problem = f"{pinned} blocks are pinned"
        if problem is None and self.fetcher.num_coming:
            problem = f"{self.fetcher.num_coming} blocks are still coming"
        if problem is not None:
            raise KVCacheError(f"DDR tier: {problem}")


def _guarded(job: Callable[[], None]) -> None:
    try:
        job()
    except Exception:
        log.exception("a job of the KV copier failed")
