"""Further down: blocks that only host memory has are written to files before they would be lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Lock

    from .block_io import BlockIO
    from .file_tier import FileTier
    from .host_tier import HostTier
    from .migration import Watermarks
    from .stats import TierCounters


class Demotion:
    """Writes the coldest unsaved blocks of host memory once they are more than the watermark allows.

    Not more than half of them are unsaved where the pool may give up as many, `room`, at once.
    """

    def __init__(
        self,
        io: BlockIO,
        host: HostTier,
        lock: Lock,
        files: FileTier,
        counters: TierCounters,
        watermarks: Watermarks,
        room: int,
        clock: Callable[[], float],
    ) -> None:
        self._io = io
        self._host = host
        self._lock = lock
        self._files = files
        self._counters = counters
        self._clock = clock
        self.on_written: Callable[[bytes], None] = lambda digest: None
        # Where files hold less than host memory does, the rest of it stays unsaved.
        rest = max(0, host.capacity - files.capacity)
        most = host.capacity - min(room, host.capacity // 2)
        self._low = max(rest, min(most, int(watermarks.low * host.capacity)))
        self._high = max(self._low, min(most, int(watermarks.high * host.capacity)))

    @property
    def is_due(self) -> bool:
        return self._files.is_writable and self._host.num_unsaved > self._high

    def run(self, deadline: float = float("inf"), *, everything: bool = False) -> None:
        """Write down to the low watermark, or `everything`, unless nothing can be written or the time is over."""
        for _ in range(self._host.num_unsaved - (0 if everything else self._low)):
            if self._clock() >= deadline:
                return
            with self._lock:
                block = self._host.coldest_unsaved()
                if block is None or not self._files.is_writable:
                    return
                self._host.pin(block)
            self._io.synchronize()  # what has been read since may be the coldest by now
            known = block.key in self._files
            written = not known and self._files.write(block.key, self._host.buffer[block.row])
            with self._lock:
                if known or written:
                    self._host.mark_saved(block)
                self._host.unpin(block)
            if not known and not written:
                return  # nor is there room for the next one
            if written:
                self._counters.bytes_to_files += self._io.block_bytes
                self.on_written(block.key.digest)
