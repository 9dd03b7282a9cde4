"""Refuses sizes that need more memory than there is, before anything is allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..backends.host import memory_bytes
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config import KVCacheConfig

_BOOKS_PER_BLOCK = 12  # owners, tree and free list of kv_runtime/pool.py, int32
_SLOT_BYTES = 512  # every column of a slot that is one value: resident.py, sampling.py and lease.py have some forty
_KEPT = 10  # one part in so many of what is free is left to the steps' own tensors
_MOST_BLOCKS = 2**31 - 1  # their ids are int32


def check_slots(max_batch_size: int, max_seq_len: int, block_size: int, num_workers: int = 1) -> None:
    """Whether the resident tables of so many slots fit, one for each worker.

    Raises:
        ConfigError: it does not.
    """
    bytes_each = num_workers * (_SLOT_BYTES + 4 * (max_seq_len + -(-max_seq_len // block_size)))
    free = memory_bytes()[0]
    most = _usable(free) // bytes_each
    _refuse_above("scheduler.max_batch_size", max_batch_size, most, max_batch_size * bytes_each, free)


def check_kv_pool(kv: KVCacheConfig, block_bytes: int, free: int, num_pools: int = 1) -> None:
    """Whether pools with blocks of so many bytes, and their books, fit into `free` bytes.

    Raises:
        ConfigError: they do not.
    """
    bytes_each = num_pools * (block_bytes + _BOOKS_PER_BLOCK)
    needed = kv.max_tokens // kv.block_size * bytes_each
    most = min(_usable(free) // bytes_each, _MOST_BLOCKS) * kv.block_size
    _refuse_above("kv_cache.max_tokens", kv.max_tokens, most, needed, free)


def check_host_tier(num_blocks: int, block_size: int, block_bytes: int, num_pools: int = 1) -> None:
    """Whether the DDR tiers, of so many blocks below each pool, fit into main memory.

    Raises:
        ConfigError: it does not.
    """
    free = memory_bytes()[0]
    bytes_each = num_pools * max(1, block_bytes)
    most = _usable(free) // bytes_each * block_size
    _refuse_above("kv_cache.ddr_tokens", num_blocks * block_size, most, num_blocks * bytes_each, free)


def _usable(free: int) -> int:
    return free - free // _KEPT


def _refuse_above(option: str, found: int, most: int, needed: int, free: int) -> None:
    if found > most:
        advice = f"write at most {most}" if most else "free some, or use a smaller model"
        raise ConfigError(
            f"{option}: found {found}, which needs {needed / 2**30:.1f} GiB; "
            f"there are {free / 2**30:.1f} GiB free: {advice}"
        )
