"""A KV pool that other processes map: anonymous shared memory on the CPU, an IPC handle on CUDA.

Both live as long as a process has them, and no longer: nothing is left when all are killed.
"""

from __future__ import annotations

import mmap
import os
import pickle
from math import prod
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING

from ....errors import ConfigError
from .messages import CUDAPool, SharedMemoryPool

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ....backends.base import Backend
    from .messages import PoolDescription


class PoolSharing:
    """Allocates one pool [N, L, 2, K, P, D] and says how others map it."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def allocate(self, backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As `Backend.allocate_kv`.

        Raises:
            ConfigError: there is not so much shared memory.
        """
        if backend.device.type != "cpu":
            return backend.allocate_kv(shape, dtype)
        size = prod(shape) * dtype.itemsize
        self._descriptor = os.memfd_create("sagellm-kv", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._descriptor, 0, size)
        except OSError as error:
            raise ConfigError(
                f"kv_cache.max_tokens: {size / 2**30:.1f} GiB of shared memory cannot be had: {error.strerror}"
            ) from error
        return _map(self._descriptor, shape, dtype)

    def describe(self, pool: Tensor) -> tuple[PoolDescription, tuple[int, ...]]:
        """How to `open_pool` it elsewhere: a description, and open files to send along."""
        if self._descriptor is None:
            from torch.multiprocessing.reductions import reduce_tensor

            mapping = reduce_tensor(pool)  # type: ignore[no-untyped-call]
            return CUDAPool(bytes(ForkingPickler.dumps(mapping))), ()
        name = str(pool.dtype).removeprefix("torch.")
        return SharedMemoryPool(tuple(pool.shape), name), (self._descriptor,)


def open_pool(description: PoolDescription, descriptors: list[int]) -> Tensor:
    """Map a pool that another process has allocated; the open files stay the caller's."""
    import torch  # the null model has no pool

    if isinstance(description, SharedMemoryPool):
        return _map(descriptors[0], description.shape, getattr(torch, description.dtype))
    rebuild, arguments = pickle.loads(description.handle)
    pool: Tensor = rebuild(*arguments)
    return pool


def _map(descriptor: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    import torch

    memory = mmap.mmap(descriptor, prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
