"""KV in units: copied between pools, exported to host buffers and imported, re-sharded between tensor-parallel sizes.

A pool is a tensor [N, L, 2, K, P, D]. A sequence keeps position p in its block `p // P` at offset `p % P`; every
function here takes the positions [start, end) of one sequence and its blocks from block `start // P` on.
Shape letters: N blocks of a pool, L layers, K kv heads, P tokens of a block, D head dim, T = end - start.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..config import KVGranularity
from ..errors import KVCacheError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    BlockIds = Sequence[int] | NDArray[np.int32]

_ALL = slice(None)


class _Piece(NamedTuple):
    """Blocks that are copied at once, and which of their tokens."""

    source: slice | Tensor
    target: slice | Tensor
    tokens: slice


def copy_kv(
    granularity: KVGranularity,
    source: Tensor,
    target: Tensor,
    source_blocks: BlockIds,
    target_blocks: BlockIds,
    start: int,
    end: int,
    layer: int | None = None,
) -> None:
    """Copy the positions [start, end) from pool `source` [N, L, 2, K, P, D] to pool `target` [M, L, 2, K, P, D].

    BLOCK copies whole blocks across layers, the positions around [start, end) in the first and last one included.
    TOKEN, LAYER and HEAD change exactly the positions [start, end): TOKEN for all layers at once, LAYER layer after
    layer, or only `layer`, HEAD one kv head after another. The pools may lie on different devices; in one pool, the
    blocks that are read and those that are written must be apart.

    Raises:
        KVCacheError: the pools differ in shape or type, the range or a block lies outside, the blocks are too few,
            or `layer` is given for another unit than LAYER.
    """
    _check_pools([source], [target])
    _, layers, _, heads, size, _ = source.shape
    if layer is not None and (granularity is not KVGranularity.LAYER or not 0 <= layer < layers):
        raise KVCacheError(f"layer {layer} of {layers} with granularity {granularity.name}: give one for LAYER only")
    sources, targets = (
        _covering(pool, blocks, start, end) for pool, blocks in ((source, source_blocks), (target, target_blocks))
    )
    if granularity is KVGranularity.BLOCK:
        start, end = start // size * size, -(-end // size) * size
    for piece in _pieces(source, target, sources, targets, start, end):
        if granularity is KVGranularity.LAYER:
            for index in range(layers) if layer is None else (layer,):
                _copy_piece(source, target, piece, layers=slice(index, index + 1))
        elif granularity is KVGranularity.HEAD:
            for head in range(heads):
                _copy_piece(source, target, piece, slice(head, head + 1), slice(head, head + 1))
        else:
            _copy_piece(source, target, piece)


def reshard_kv(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    source_blocks: BlockIds,
    target_blocks: BlockIds,
    start: int,
    end: int,
) -> None:
    """Copy the positions [start, end) between the pools of two tensor-parallel groups, by kv head.

    `sources` are the s pools [N, L, 2, K / s, P, D] of one group in the order of their ranks, `targets` the t pools
    [M, L, 2, K / t, P, D] of the other; each group has the same blocks on every rank. No other position changes.

    Raises:
        KVCacheError: as `copy_kv`, or a group's pools do not have the same heads in all.
    """
    _check_pools(sources, targets)
    own, other = (pools[0].shape[3] for pools in (sources, targets))
    if own * len(sources) != other * len(targets):
        raise KVCacheError(f"{len(sources)} pools of {own} kv heads do not hold {len(targets)} times {other} heads")
    from_blocks, to_blocks = (
        _covering(pools[0], blocks, start, end)
        for pools, blocks in ((sources, source_blocks), (targets, target_blocks))
    )
    bounds = sorted({*range(0, own * len(sources), own), *range(0, own * len(sources) + 1, other)})
    for first, last in pairwise(bounds):
        source, target = sources[first // own], targets[first // other]
        heads = slice(first % own, first % own + last - first)
        into = slice(first % other, first % other + last - first)
        for piece in _pieces(source, target, from_blocks, to_blocks, start, end):
            _copy_piece(source, target, piece, heads, into)


def export_kv(granularity: KVGranularity, pool: Tensor, blocks: BlockIds, start: int, end: int) -> Tensor:
    """Return the positions [start, end) as a contiguous host tensor, in which every unit is contiguous too.

    Its shape is [n, L, 2, K, P, D] for BLOCK (n whole blocks), [T, L, 2, K, D] for TOKEN, [L, T, 2, K, D] for LAYER and
    [K, T, L, 2, D] for HEAD; entry i is unit i.

    Raises:
        KVCacheError: the range or a block lies outside the pool, or the blocks are too few.
    """
    ids = torch.from_numpy(_covering(pool, blocks, start, end)).to(pool.device)
    if granularity is KVGranularity.BLOCK:
        return pool[ids].cpu()
    rows, offsets = _rows_and_offsets(pool, ids, start, end)
    units = pool[rows, :, :, :, offsets].permute(*_UNIT_FIRST[granularity])
    return units.contiguous().cpu()


def import_kv(
    granularity: KVGranularity,
    buffer: Tensor,
    pool: Tensor,
    blocks: BlockIds,
    start: int,
    end: int,
    first_unit: int = 0,
) -> None:
    """Write units that `export_kv` made, from `first_unit` on, to the positions [start, end) of `pool`.

    `buffer` may be any run of units, `buffer[2:4]` with `first_unit` 2 for example: what it does not hold stays.

    Raises:
        KVCacheError: as `export_kv`, or the buffer's shape or type is not that of such units.
    """
    ids = torch.from_numpy(_covering(pool, blocks, start, end)).to(pool.device)
    whole = _export_shape(granularity, pool, len(ids), end - start)
    units = slice(first_unit, first_unit + len(buffer))
    if tuple(buffer.shape[1:]) != whole[1:] or not 0 <= units.start <= units.stop <= whole[0]:
        raise KVCacheError(
            f"{granularity.name}: found units {units.start} to {units.stop} of shape {list(buffer.shape[1:])}, "
            f"[{start}, {end}) has {whole[0]} of {list(whole[1:])}"
        )
    if buffer.dtype != pool.dtype:
        raise KVCacheError(f"the buffer holds {buffer.dtype}, the pool {pool.dtype}")
    buffer = buffer.to(pool.device)
    if granularity is KVGranularity.BLOCK:
        pool[ids[units]] = buffer
        return
    rows, offsets = _rows_and_offsets(pool, ids, start, end)
    tokens = buffer.permute(*_TOKEN_FIRST[granularity])
    if granularity is KVGranularity.TOKEN:
        pool[rows[units], :, :, :, offsets[units]] = tokens
    elif granularity is KVGranularity.LAYER:
        pool[rows, units, :, :, offsets] = tokens
    else:
        pool[rows, :, :, units, offsets] = tokens


# Of [T, L, 2, K, D]: which axis comes where in a buffer, and back.
_UNIT_FIRST = {
    KVGranularity.TOKEN: (0, 1, 2, 3, 4),
    KVGranularity.LAYER: (1, 0, 2, 3, 4),
    KVGranularity.HEAD: (3, 0, 1, 2, 4),
}
_TOKEN_FIRST = {
    KVGranularity.TOKEN: (0, 1, 2, 3, 4),
    KVGranularity.LAYER: (1, 0, 2, 3, 4),
    KVGranularity.HEAD: (1, 2, 3, 0, 4),
}


def _export_shape(granularity: KVGranularity, pool: Tensor, blocks: int, tokens: int) -> tuple[int, ...]:
    _, layers, _, heads, size, dim = pool.shape
    if granularity is KVGranularity.BLOCK:
        return (blocks, layers, 2, heads, size, dim)
    by_token = (tokens, layers, 2, heads, dim)
    return tuple(by_token[axis] for axis in _UNIT_FIRST[granularity])


def _rows_and_offsets(pool: Tensor, ids: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    size = pool.shape[4]
    positions = torch.arange(start, end, device=pool.device)
    return ids[positions // size - start // size], positions % size


def _covering(pool: Tensor, blocks: BlockIds, start: int, end: int) -> NDArray[np.int64]:
    """Those of the blocks in which [start, end) lies."""
    num_blocks, size = pool.shape[0], pool.shape[4]
    if not 0 <= start <= end:
        raise KVCacheError(f"positions [{start}, {end}) are no range")
    needed = -(-end // size) - start // size if end > start else 0
    if len(blocks) < needed:
        raise KVCacheError(f"positions [{start}, {end}) lie in {needed} blocks of {size}, found {len(blocks)}")
    ids = np.asarray(blocks[:needed], np.int64)
    if needed and (ids.min() < 0 or ids.max() >= num_blocks):
        raise KVCacheError(f"blocks {ids.min()} to {ids.max()} are not all in a pool of {num_blocks}")
    return ids


def _check_pools(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    kinds = set()
    for pools in (sources, targets):
        heads = pools[0].shape[3]
        kinds |= {(pool.dtype, pool.shape[1:3], pool.shape[4:]) for pool in pools}
        if any(pool.shape[3] != heads for pool in pools):
            raise KVCacheError("the pools of a tensor-parallel group have different numbers of kv heads")
    if len(kinds) > 1 or (len(sources) == len(targets) and sources[0].shape[3] != targets[0].shape[3]):
        found = " and ".join(f"{pools[0].dtype} {list(pools[0].shape[1:])}" for pools in (sources, targets))
        raise KVCacheError(f"KV cannot be copied between pools of {found}")


def _pieces(
    source: Tensor, target: Tensor, sources: NDArray[np.int64], targets: NDArray[np.int64], start: int, end: int
) -> Iterator[_Piece]:
    """The first block from its first token on, the last one up to its last token, and what lies between."""
    if not len(sources):
        return
    size = source.shape[4]
    head, tail = start % size, end % size
    if len(sources) == 1 and (head or tail):
        yield _Piece(_run(sources, 0, 1), _run(targets, 0, 1), slice(head, tail or size))
        return
    first, last = int(head > 0), len(sources) - int(tail > 0)
    if head:
        yield _Piece(_run(sources, 0, 1), _run(targets, 0, 1), slice(head, size))
    if source.device.type == target.device.type == "cpu":
        # A slice is copied in place; an index would be gathered first.
        breaks = np.flatnonzero((np.diff(sources[first:last]) != 1) | (np.diff(targets[first:last]) != 1)) + first + 1
        bounds = [first, *breaks.tolist(), last]
        for begin, until in pairwise(bounds):
            if begin < until:
                yield _Piece(_run(sources, begin, until), _run(targets, begin, until), _ALL)
    elif first < last:
        whole = slice(first, last)
        yield _Piece(_index(sources[whole], source), _index(targets[whole], target), _ALL)
    if tail:
        yield _Piece(_run(sources, last, last + 1), _run(targets, last, last + 1), slice(0, tail))


def _run(ids: NDArray[np.int64], begin: int, until: int) -> slice:
    return slice(int(ids[begin]), int(ids[begin]) + until - begin)


def _index(ids: NDArray[np.int64], pool: Tensor) -> Tensor:
    return torch.from_numpy(ids).to(pool.device)


def _copy_piece(
    source: Tensor, target: Tensor, piece: _Piece, heads: slice = _ALL, into: slice = _ALL, layers: slice = _ALL
) -> None:
    values = source[piece.source, layers, :, heads, piece.tokens]
    target[piece.target, layers, :, into, piece.tokens] = values.to(target.device)
