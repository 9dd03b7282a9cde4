"""Whole blocks between the KV pool of another process, which is mapped here, and host memory, for the tiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....errors import KVCacheError
from ....kv_runtime.tiers.block_io import NoBytesIO

if TYPE_CHECKING:
    from collections.abc import Callable

    from ....config import KVGranularity
    from ....kv_runtime.pool import Int32Array
    from ....kv_runtime.tiers import BlockIO
    from ....kv_runtime.tiers.block_io import Bytes, Rows
    from .remote_executor import MappablePool, RemotePool


class RemoteBlockIO:
    """A `BlockIO` over whichever pool the process has now. While there is none, copies raise KVCacheError.

    Steps run elsewhere and cannot wait for copies that are only queued: `read` returns when the bytes are there.
    """

    def __init__(self, pool: RemotePool, granularity: KVGranularity, fence: Callable[[], None]) -> None:
        self.fence = fence
        self._pool = pool
        self._granularity = granularity
        self._mapped: tuple[MappablePool, BlockIO] | None = None
        io = self._io()
        self.block_bytes, self.layout = io.block_bytes, io.layout

    def allocate(self, count: int) -> Bytes:
        return self._io().allocate(count)

    def read(self, blocks: Int32Array, buffer: Bytes, rows: Rows) -> None:
        io = self._io()
        io.read(blocks, buffer, rows)
        io.synchronize()

    def write(self, blocks: Int32Array, buffer: Bytes, rows: Rows) -> None:
        self._io().write(blocks, buffer, rows)

    def synchronize(self) -> None:
        """What was read is there."""

    def _io(self) -> BlockIO:
        current, mapped = self._pool.current, self._mapped
        if current is None:
            raise KVCacheError("the worker's process, and its KV pool with it, is being started")
        if mapped is None or mapped[0] is not current:
            mapped = self._mapped = current, self._map(current)
        return mapped[1]

    def _map(self, pool: MappablePool) -> BlockIO:
        if pool.description is None:
            return NoBytesIO()
        from ..torch_block_io import TorchBlockIO
        from .shared_pool import open_pool

        return TorchBlockIO(open_pool(pool.description, [*pool.descriptors]), self._granularity, self.fence)
