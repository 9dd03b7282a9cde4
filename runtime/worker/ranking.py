"""The best tokens of each row, in one order that depends on nothing but the row: value descending, then id ascending.

`torch.topk` leaves the order of equal values open, and logits computed in bfloat16 have many equal values. Here each
value and its id are packed into one int64 key, so that no two are equal and a longer ranking extends a shorter one.
Shape letters: R rows, V vocabulary, K tokens wanted, N blocks of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64
_ID_MASK = 0x7FFFFFFF


def split_blocks(values: Tensor, fill: float) -> Tensor:
    """values [R, V] -> [R, N, BLOCK], a view unless the last block has to be filled up."""
    short = -values.shape[-1] % BLOCK
    if short:
        values = pad(values, (0, short), value=fill)
    return values.reshape(len(values), values.shape[-1] // BLOCK, BLOCK)


def argmax(values: Tensor) -> Tensor:
    """values [R, V] -> [R] int64, the lowest id among the largest values.

    On the CPU in two levels: the vectorised block maximum reads at memory speed, torch.argmax at an eighth of it.
    """
    if values.device.type != "cpu" or values.dtype is not torch.float32:
        return values.argmax(-1)
    blocks = split_blocks(values, -torch.inf)
    block = blocks.amax(-1).argmax(-1)
    return block * BLOCK + _take_blocks(blocks, block[:, None])[:, 0].argmax(-1)


def rank_top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first K of each row's ranking: float32 values [R, V] -> (values [R, K], ids [R, K]); K is at most V.

    The K best tokens lie in the K blocks whose best tokens rank first, so only those blocks are looked at.
    """
    vocab_size = values.shape[-1]
    k = min(k, vocab_size)
    blocks = split_blocks(values, -torch.inf)
    if 2 * k > blocks.shape[1]:
        return _unpack(values, torch.topk(_pack(values, _ids_like(values)), k).values)
    best = blocks.amax(-1)
    chosen = _ids_of(torch.topk(_pack(best, _ids_like(best)), k, sorted=False).values)
    inside = torch.arange(BLOCK, device=values.device)
    keys = _pack(_take_blocks(blocks, chosen), chosen[:, :, None] * BLOCK + inside).flatten(1)
    return _unpack(values, torch.topk(keys, k).values)


def rank_all(values: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's whole ranking: float32 values [R, V] -> (values [R, V], ids [R, V])."""
    keys = _pack(values, _ids_like(values))
    if keys.device.type == "cpu":  # numpy sorts integers with SIMD, six times faster than torch on the CPU
        keys = torch.from_numpy(np.sort(keys.numpy(), axis=-1)).flip(-1)
    else:
        keys = torch.sort(keys, dim=-1, descending=True).values
    return _unpack(values, keys)


def _take_blocks(blocks: Tensor, chosen: Tensor) -> Tensor:
    """blocks [R, N, BLOCK], chosen [R, K] -> [R, K, BLOCK]."""
    return blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK))


def _ids_like(values: Tensor) -> Tensor:
    return torch.arange(values.shape[-1], device=values.device).expand_as(values)


def _pack(values: Tensor, ids: Tensor) -> Tensor:
    """Order-preserving keys: the float's bits made monotonic in the upper half, the reversed id in the lower."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: equal values get equal bits
    bits = bits ^ ((bits >> 31) & _ID_MASK)
    return (bits.long() << 32) | (_ID_MASK - ids)


def _ids_of(keys: Tensor) -> Tensor:
    return _ID_MASK - (keys & 0xFFFFFFFF)


def _unpack(values: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    ids = _ids_of(keys)
    return values.gather(-1, ids), ids
