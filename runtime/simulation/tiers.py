"""Tiers of a simulation: the real ones, over copies that only take time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...kv_runtime.tiers import FileTier

if TYPE_CHECKING:
    from ...kv_runtime.pool import Int32Array
    from ...kv_runtime.tiers.block_io import Bytes, Rows
    from ...kv_runtime.tiers.block_key import BlockKey
    from .executor import SimulatedExecutor, StepTimes
    from .virtual_time import VirtualTime


class SimulatedBlockIO:
    """Copies blocks of no bytes between a pool and host memory, one copy after the other, as `TorchBlockIO` does on a
    GPU: what is read waits for the steps launched so far, and the next step for it; who writes waits for both.

    What comes from `files` counts as one transfer from there, its way through host memory included.
    """

    layout = "simulated"

    def __init__(
        self,
        executor: SimulatedExecutor,
        times: StepTimes,
        block_size: int,
        time: VirtualTime,
        files: SimulatedFiles | None,
    ) -> None:
        self.block_bytes = times.kv_bytes_per_token * block_size
        self._executor = executor
        self._times = times
        self._time = time
        self._files = files
        self._free_at = 0.0

    def allocate(self, count: int) -> Bytes:
        return np.empty((count, 0), np.uint8)

    def read(self, blocks: Int32Array, buffer: Bytes, rows: Rows) -> None:
        self._executor.free_at = self._copy(len(blocks), "ddr")

    def write(self, blocks: Int32Array, buffer: Bytes, rows: Rows) -> None:
        path = "nvme" if self._files is not None and self._files.take_read() else "ddr"
        self._time.sleep_until(self._copy(len(blocks), path))

    def _copy(self, blocks: int, path: str) -> float:
        begin = max(self._time.now, self._executor.free_at, self._free_at)
        self._free_at = begin + self._times.transfer_seconds(blocks * self.block_bytes, path)
        return self._free_at

    def synchronize(self) -> None:
        self._time.sleep_until(self._free_at)

    def fence(self) -> None:
        self._time.sleep_until(self._executor.free_at)


class SimulatedFiles(FileTier):
    """The books of a folder that is not there. With `has_all` other engines have put every block there that is looked
    for."""

    def __init__(self, capacity: int, block_bytes: int, times: StepTimes, time: VirtualTime, *, has_all: bool) -> None:
        self._block_bytes = block_bytes
        self._times = times
        self._time = time
        self._has_all = has_all
        self._read = 0  # blocks that the next copy is of
        super().__init__(Path(), b"", capacity, 1, 0)

    def take_read(self) -> int:
        """How many blocks were read since somebody asked."""
        read, self._read = self._read, 0
        return read

    def _open(self) -> list[bytes]:
        return []

    def _is_there(self, digest: bytes) -> bool:
        return self._has_all or digest in self._index or digest in self._kept

    def _load(self, key: BlockKey, into: Bytes) -> None:
        self._read += 1

    def _store(self, key: BlockKey, data: Bytes) -> None:
        self._time.sleep_until(self._time.now + self._times.transfer_seconds(self._block_bytes, "nvme"))

    def _delete(self, digest: bytes) -> None:
        """There is nothing to delete."""
