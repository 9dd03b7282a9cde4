"""Whole blocks between the KV tensor and host memory, for the tiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ...config import KVGranularity
from ...kv_runtime.granularity import copy_kv

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from ...kv_runtime.pool import Int32Array
    from ...kv_runtime.tiers.block_io import Bytes, Rows


class TorchBlockIO:
    """Copies between a pool [N, L, 2, K, P, D] and rows of host buffers, in units of `granularity`.

    `fence` waits for the steps launched so far. On a GPU, host memory is pinned and copies go over a stream of their
    own: the compute stream waits for what is read, and what is written waits for the compute stream.
    """

    def __init__(self, pool: Tensor, granularity: KVGranularity, fence: Callable[[], None]) -> None:
        self.block_bytes = pool[0].nbytes
        self.layout = f"{pool.dtype} {list(pool.shape[1:])}"
        self.fence = fence
        self._pool = pool
        self._granularity = granularity
        self._stream = torch.cuda.Stream(pool.device) if pool.is_cuda else None  # type: ignore[no-untyped-call]

    def allocate(self, count: int) -> Bytes:
        buffer = torch.empty((count, self.block_bytes), dtype=torch.uint8, pin_memory=self._stream is not None)
        bytes_: NDArray[np.uint8] = buffer.numpy()
        return bytes_

    def read(self, blocks: Int32Array, buffer: Bytes, rows: Rows) -> None:
        host = self._as_pool(buffer)
        if self._stream is None:
            self._copy(self._pool, host, blocks, rows)
            return
        compute = torch.cuda.current_stream(self._pool.device)
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            self._copy(self._pool, host, blocks, rows)
        compute.wait_stream(self._stream)

    def write(self, blocks: Int32Array, buffer: Bytes, rows: Rows) -> None:
        host = self._as_pool(buffer)
        if self._stream is None:
            self._copy(host, self._pool, rows, blocks)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._pool.device))
        with torch.cuda.stream(self._stream):
            self._copy(host, self._pool, rows, blocks)
        self._stream.synchronize()

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    @torch.inference_mode()
    def _copy(self, source: Tensor, target: Tensor, sources: NDArray[np.integer], targets: NDArray[np.integer]) -> None:
        if self._stream is not None and self._granularity is KVGranularity.BLOCK:
            for one, other in zip(sources.tolist(), targets.tolist(), strict=True):
                target[other].copy_(source[one], non_blocking=True)
            return
        tokens = len(sources) * self._pool.shape[4]
        copy_kv(self._granularity, source, target, sources.astype(np.int32), targets.astype(np.int32), 0, tokens)

    def _as_pool(self, buffer: Bytes) -> Tensor:
        """The buffer [R, block_bytes] as a pool of R blocks."""
        return torch.from_numpy(buffer).view(self._pool.dtype).view(len(buffer), *self._pool.shape[1:])
