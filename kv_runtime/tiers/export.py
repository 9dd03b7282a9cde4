"""Straight to files: a prompt's KV for another engine, which finds it under the same names."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..pool import Int32Array
    from .block_io import BlockIO
    from .block_key import BlockKey
    from .file_tier import FileTier
    from .stats import TierCounters

log = logging.getLogger("sageLLM")

_BATCH = 64  # blocks that are read at once


def export_blocks(
    keys: list[BlockKey], blocks: Int32Array, io: BlockIO, files: FileTier, counters: TierCounters
) -> int:
    """Write the named blocks of the pool, which their caller owns, to files; return how many are not there then.

    A block that is there already, by whomever, is not written again. None of them makes room for what is written later;
    where there is no room left, what comes is missing.
    """
    wanted = []
    for key, block in zip(keys, blocks.tolist(), strict=True):
        if files.discover(key):
            files.keep(key)
        else:
            wanted.append((key, block))
    buffer, missing = io.allocate(min(_BATCH, len(wanted))), len(wanted)
    try:
        for begin in range(0, len(wanted), _BATCH):
            batch = wanted[begin : begin + _BATCH]
            io.read(np.array([block for _, block in batch], np.int32), buffer, np.arange(len(batch)))
            io.synchronize()
            for row, (key, _) in enumerate(batch):
                if files.write(key, buffer[row]):
                    files.keep(key)
                    missing -= 1
                    counters.bytes_to_files += io.block_bytes
    except Exception:
        log.exception("KV could not be exported")
    else:
        if missing and not counters.unexported_blocks and files.is_writable:
            log.warning("kv_cache.nvme_tokens: there is no room left to export KV: write more, or delete what is there")
    counters.unexported_blocks += missing
    return missing
