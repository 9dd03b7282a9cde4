"""Builds the tiers that the configuration asks for."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from ..kv_runtime.tiers import FileTier, KVTiers, TemperatureClassifier, Watermarks
from ..models.resolve import weights_digest
from .memory import check_host_tier

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..config import KVCacheConfig
    from ..kv_runtime.cache import KVCache
    from ..kv_runtime.tiers import FetchCost
    from ..kv_runtime.tiers.kv_tiers import Submit
    from ..models.resolve import ResolvedModel
    from .worker.executor import PooledExecutor

_FORMAT = 1  # of what a fingerprint stands for
_MOST_BUFFERED = 256  # blocks of main memory on the way to files, where there is no DDR tier


def build_tiers(
    config: KVCacheConfig,
    model: ResolvedModel,
    pools: list[tuple[KVCache, PooledExecutor]],
    cost: FetchCost | None,
    clock: Callable[[], float],
) -> list[KVTiers]:
    """Make the tiers below each pool: DDR of its own, and one folder for all. The executors, which hold the blocks,
    save what is given up before each step.

    Without a `cost` every hit is brought up.

    Raises:
        ConfigError: there is not enough main memory for the DDR tiers.
    """
    io, size = pools[0][1].block_io, config.block_size
    host_blocks, nvme = tier_blocks(config)
    check_host_tier(host_blocks, size, io.block_bytes, len(pools))
    files = None
    if config.nvme_path is not None:
        files = FileTier(config.nvme_path, kv_fingerprint(model, io.layout, size), nvme, size, io.block_bytes)
    submit = None if io.block_bytes else _at_once
    return [build_below(config, kv, executor, host_blocks, files, cost, clock, submit) for kv, executor in pools]


def tier_blocks(config: KVCacheConfig) -> tuple[int, int]:
    """Blocks of main memory, which without a DDR tier are for those on their way to files, and blocks in files."""
    ddr, nvme = (tokens // config.block_size for tokens in config.tier_tokens)
    return ddr or min(_MOST_BUFFERED, config.max_tokens // config.block_size), nvme


def build_below(
    config: KVCacheConfig,
    kv: KVCache,
    executor: PooledExecutor,
    host_blocks: int,
    files: FileTier | None,
    cost: FetchCost | None,
    clock: Callable[[], float],
    submit: Submit | None,
) -> KVTiers:
    """Make the tiers below one pool; see `KVTiers` for `submit`."""
    io = executor.block_io
    high, low, promote = config.watermarks
    watermarks = Watermarks(high, low, promote) if config.tier_tokens[0] else Watermarks(0.0, 0.0, promote)
    classifier = None
    if config.enable_migration:
        classifier = TemperatureClassifier(config.hot_threshold, config.cold_timeout_s, clock)
    tiers = KVTiers(
        kv, io, host_blocks, files, watermarks=watermarks, classifier=classifier, cost=cost, submit=submit, clock=clock
    )
    executor.before_step = tiers.flush
    return tiers


def _at_once(job: Callable[[], None]) -> None:
    """There is nothing to wait for: blocks of no bytes need no thread, and a run stays deterministic."""
    job()


def kv_fingerprint(model: ResolvedModel, layout: str, block_size: int) -> bytes:
    """What must be the same for KV to be the same: weights, dtype and layout of a block, its size, the format. [32]"""
    parts = (str(_FORMAT), model.fingerprint, weights_digest(model), layout, str(block_size))
    return sha256("\n".join(parts).encode()).digest()
