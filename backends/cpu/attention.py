"""Paged attention on the CPU: one gather and one SDPA call a layer for all decoding sequences of similar length, and
one of each for all prompt chunks of the same shape that follow one another.

The pool [N, L, 2, K, P, D] is read as rows of P * D elements, one per (block, layer, k/v, head). A step's row indices
are computed once, for layer 0; layer l reads the same indices from a view that begins 2 * K * l rows later. SDPA gets
the G = H / K query heads of a KV head as further rows of queries, so that K and V are never repeated, and its
products are as tall as can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from ..base import StepLayout

# A group of decoding sequences of its own costs about as much as gathering and multiplying this many bytes of padding.
SPLIT_BYTES = 256 << 10
# Queries of a chunk that are handled at once: the fewer, the less is multiplied only to be masked.
PIECE = 128
# Elements of the mask; with a longer context the pieces get smaller.
MASK_ELEMENTS = 1 << 23


@dataclass(slots=True)
class DecodeGroup:
    """Decoding sequences that are padded to one length and attended together."""

    members: Tensor | slice  # which tokens of the step, [S]
    rows: Tensor  # [2 * S * K * B] rows of the pool, for layer 0
    length: int  # tokens that are read of each sequence
    mask: Tensor | None  # [S, 1, 1, length] additive


@dataclass(slots=True)
class Chunks:
    """Runs of prompt tokens, one each of `count` sequences that follow one another in the step and are alike in
    length. Without a prefix in the pool, K and V are the chunks' own."""

    start: int  # first token of the step
    count: int
    length: int  # tokens of each run
    context: int  # tokens of each sequence, these included
    rows: Tensor | None  # [2 * count * K * B] rows of the pool for layer 0; None: no prefix


@dataclass(slots=True)
class AttentionPlan:
    """What all layers of one step share."""

    keys: Tensor  # [T, K] rows of D elements that the step's K goes to, in layer 0
    values: Tensor  # [T, K] the same for V
    groups: list[DecodeGroup]
    chunks: list[Chunks]
    piece: int  # queries of a chunk that are handled at once
    mask: Tensor  # see `causal_mask`
    scratch: Tensor  # gathered K and V of one group or chunk, rows of P * D elements


class PoolRows:
    """Row numbers of a pool of a given shape, for layer 0."""

    def __init__(self, kv: Tensor) -> None:
        num_layers, _, self.num_kv_heads, self.block_size, _ = kv.shape[1:]
        self.block_rows = num_layers * 2 * self.num_kv_heads  # rows of P * D elements in one block

    def of_tokens(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Slots [T] -> the rows of D elements [T, K] of their K, and of their V."""
        blocks, offsets = slots // self.block_size, slots % self.block_size
        first = blocks[:, None] * self.block_rows + torch.arange(self.num_kv_heads)
        keys = first * self.block_size + offsets[:, None]
        return keys, keys + self.num_kv_heads * self.block_size

    def of_blocks(self, tables: Tensor) -> Tensor:
        """Block ids [S, B] -> rows of P * D elements, K of all sequences and then V, flat: [2 * S * K * B]."""
        parts = torch.arange(2 * self.num_kv_heads).view(2, 1, self.num_kv_heads, 1)
        return (tables[:, None, :] * self.block_rows + parts).flatten()


def plan_attention(layout: StepLayout, kv: Tensor, num_heads: int) -> AttentionPlan:
    """Indices, masks and scratch of a step over the pool `kv`."""
    rows = PoolRows(kv)
    contexts = layout.context_lens.tolist()
    groups = _plan_decodes(layout, contexts[: layout.num_decodes], kv, rows)
    chunks = _plan_chunks(layout, contexts, rows)
    sizes = [group.rows.shape[0] for group in groups]
    sizes += [chunk.rows.shape[0] for chunk in chunks if chunk.rows is not None]
    scratch = torch.empty(max(sizes, default=0), rows.block_size * kv.shape[5], dtype=kv.dtype)
    group_size, longest = num_heads // rows.num_kv_heads, max((chunk.context for chunk in chunks), default=0)
    piece = max((chunk.length for chunk in chunks), default=0)
    piece = min(piece, PIECE, max(1, MASK_ELEMENTS // (group_size * max(longest, 1))))
    mask = causal_mask(piece, group_size, longest, kv.dtype)
    return AttentionPlan(*rows.of_tokens(layout.slots), groups, chunks, piece, mask, scratch)


def causal_mask(queries: int, group_size: int, keys: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [queries * G, keys] of the last `queries` tokens of a sequence, G rows for each token.

    The last n * G rows and m columns of it are the mask of n queries over m keys, for every n and m.
    """
    mask = torch.zeros(queries * group_size, keys, dtype=dtype)
    hidden = torch.ones(queries, queries, dtype=torch.bool).triu_(1).repeat_interleave(group_size, dim=0)
    mask[:, keys - queries :].masked_fill_(hidden, float("-inf"))
    return mask


def _plan_chunks(layout: StepLayout, contexts: list[int], rows: PoolRows) -> list[Chunks]:
    chunks = []
    start = index = layout.num_decodes
    while index < len(contexts):
        length, context = layout.query_lens[index], contexts[index]
        end = index + 1
        while end < len(contexts) and (layout.query_lens[end], contexts[end]) == (length, context):
            end += 1
        gathered = None
        if context > length:
            gathered = rows.of_blocks(layout.block_tables[index:end, : -(-context // rows.block_size)])
        chunks.append(Chunks(start, end - index, length, context, gathered))
        start += (end - index) * length
        index = end
    return chunks


def _plan_decodes(layout: StepLayout, contexts: list[int], kv: Tensor, rows: PoolRows) -> list[DecodeGroup]:
    blocks = [-(-context // rows.block_size) for context in contexts]
    groups = []
    for members in group_by_length(blocks, kv[0, 0].numel() * kv.element_size()):
        lengths = torch.tensor([contexts[index] for index in members])
        longest = int(lengths.max())
        mask = None
        if int(lengths.min()) < longest:
            hidden = torch.arange(longest) >= lengths[:, None]
            mask = torch.zeros(hidden.shape, dtype=kv.dtype).masked_fill_(hidden, float("-inf"))[:, None, None]
        chosen = slice(len(contexts)) if len(members) == len(contexts) else torch.tensor(members)
        tables = layout.block_tables[chosen, : -(-longest // rows.block_size)]
        groups.append(DecodeGroup(chosen, rows.of_blocks(tables), longest, mask))
    return groups


def group_by_length(blocks: list[int], block_bytes: int) -> list[list[int]]:
    """Split sequences of so many blocks each into groups that are worth padding to their longest member.

    A cut is made where it saves the most padding, as long as that is more than SPLIT_BYTES. A single group is in the
    order of the sequences.
    """

    def split(members: list[int]) -> list[list[int]]:  # longest first
        saved = [(blocks[members[0]] - blocks[index]) * (len(members) - i) for i, index in enumerate(members)]
        cut = max(range(len(members)), key=saved.__getitem__)
        if saved[cut] * block_bytes <= SPLIT_BYTES:
            return [members]
        return [*split(members[:cut]), *split(members[cut:])]

    if not blocks:
        return []
    groups = split(sorted(range(len(blocks)), key=lambda index: -blocks[index]))
    return groups if len(groups) > 1 else [list(range(len(blocks)))]


def attend(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, layer: int, plan: AttentionPlan, scale: float) -> Tensor:
    """Write k, v [T, K, D] to the pool, then causal paged attention of q [T, H, D] -> [T, H, D]."""
    tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv.shape[3:5]
    layer_rows = layer * 2 * num_kv_heads
    token_rows = kv.view(-1, head_dim)[layer_rows * block_size :]
    token_rows.index_put_((plan.keys,), k)
    token_rows.index_put_((plan.values,), v)

    pool = kv.view(-1, block_size * head_dim)[layer_rows:]
    q = q.view(tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if len(plan.groups) == 1 and not plan.chunks:
        return _attend_decodes(q, pool, plan.groups[0], plan.scratch, scale).reshape(tokens, num_heads, head_dim)
    out = q.new_empty(q.shape)
    for group in plan.groups:
        out[group.members] = _attend_decodes(q[group.members], pool, group, plan.scratch, scale)
    for chunk in plan.chunks:
        own = slice(chunk.start, chunk.start + chunk.count * chunk.length)
        shape = (chunk.count, chunk.length, num_kv_heads)
        if chunk.rows is None:
            keys, values = (x[own].view(*shape, head_dim).transpose(1, 2) for x in (k, v))
        else:
            gathered = torch.index_select(pool, 0, chunk.rows, out=plan.scratch[: chunk.rows.shape[0]])
            keys, values = gathered.view(2, chunk.count, num_kv_heads, -1, head_dim)
        inner = (*shape, num_heads // num_kv_heads, head_dim)
        _attend_chunks(q[own].view(inner), keys, values, chunk.context, plan, scale, out[own].view(inner))
    return out.view(tokens, num_heads, head_dim)


def _attend_decodes(q: Tensor, pool: Tensor, group: DecodeGroup, scratch: Tensor, scale: float) -> Tensor:
    """[S, K, G, D] -> [S, K, G, D], one query a sequence, G heads of a KV head as rows of one product."""
    size, num_kv_heads, _, head_dim = q.shape
    gathered = torch.index_select(pool, 0, group.rows, out=scratch[: group.rows.shape[0]])
    keys, values = gathered.view(2, size, num_kv_heads, -1, head_dim)[:, :, :, : group.length]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=group.mask, scale=scale)


def _attend_chunks(
    q: Tensor, keys: Tensor, values: Tensor, context: int, plan: AttentionPlan, scale: float, out: Tensor
) -> None:
    """q [S, T, K, G, D], the last T of `context` tokens each; keys, values [S, K, >= context, D]; fills out like q."""
    count, length, num_kv_heads, group_size, head_dim = q.shape
    longest = plan.mask.shape[1]
    for start in range(0, length, plan.piece):
        stop = min(start + plan.piece, length)
        seen = context - length + stop
        attended = F.scaled_dot_product_attention(
            q[:, start:stop].transpose(1, 2).reshape(count, num_kv_heads, -1, head_dim),
            keys[:, :, :seen],
            values[:, :, :seen],
            attn_mask=plan.mask[(plan.piece - stop + start) * group_size :, longest - seen :],
            scale=scale,
        )
        out[:, start:stop] = attended.view(count, num_kv_heads, -1, group_size, head_dim).transpose(1, 2)
