"""Paged attention on the CPU: one gather and one SDPA call a layer for all decoding sequences of similar length, and
one of each for every prompt chunk.

The pool [N, L, 2, K, P, D] is read as rows of P * D elements, one per (block, layer, k/v, head). A step's row indices
are computed once, for layer 0; layer l reads the same indices from a view that begins 2 * K * l rows later. SDPA gets
the G = H / K query heads of a KV head as rows (decode) or as a broadcast batch dimension (chunks), so that K and V
are never repeated in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from ..base import StepLayout

# Padding to the longest sequence is read and multiplied for nothing; a group of sequences of its own costs about as
# much as moving this many bytes.
SPLIT_BYTES = 1 << 20
# Elements of one attention mask; queries of a longer chunk are handled in pieces.
MASK_ELEMENTS = 1 << 22


@dataclass(slots=True)
class DecodeGroup:
    """Decoding sequences that are padded to one length and attended together."""

    members: Tensor | slice  # which tokens of the step, [S]
    rows: Tensor  # [2 * S * K * B] rows of the pool, for layer 0
    length: int  # tokens that are read of each sequence
    mask: Tensor | None  # [S, 1, 1, length] additive


@dataclass(slots=True)
class Piece:
    """Some queries of a chunk and the keys they may see."""

    start: int  # first token, counted in the chunk
    stop: int
    keys: int  # tokens of the sequence's context that are read
    mask: Tensor  # [stop - start, keys] additive


@dataclass(slots=True)
class Chunk:
    """A run of prompt tokens of one sequence. Without a prefix in the pool, K and V are the chunk's own."""

    start: int  # first token of the step
    stop: int
    rows: Tensor | None  # [2 * K * B] rows of the pool for layer 0; None: no prefix
    pieces: list[Piece]


@dataclass(slots=True)
class AttentionPlan:
    """What all layers of one step share."""

    keys: Tensor  # [T, K] rows of D elements that the step's K goes to, in layer 0
    values: Tensor  # [T, K] the same for V
    groups: list[DecodeGroup]
    chunks: list[Chunk]
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


def plan_attention(layout: StepLayout, kv: Tensor) -> AttentionPlan:
    """Indices, masks and scratch of a step over the pool `kv`."""
    rows = PoolRows(kv)
    contexts = layout.context_lens.tolist()
    groups = _plan_decodes(layout, contexts[: layout.num_decodes], kv, rows)
    chunks = []
    start = layout.num_decodes
    for index in range(layout.num_decodes, len(contexts)):
        length, context = layout.query_lens[index], contexts[index]
        if context == length:
            chunks.append(Chunk(start, start + length, None, []))
        else:
            table = layout.block_tables[index : index + 1, : -(-context // rows.block_size)]
            pieces = _cut_into_pieces(length, context, kv.dtype)
            chunks.append(Chunk(start, start + length, rows.of_blocks(table), pieces))
        start += length
    gathered = [group.rows.shape[0] for group in groups]
    gathered += [chunk.rows.shape[0] for chunk in chunks if chunk.rows is not None]
    scratch = torch.empty(max(gathered, default=0), rows.block_size * kv.shape[5], dtype=kv.dtype)
    return AttentionPlan(*rows.of_tokens(layout.slots), groups, chunks, scratch)


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


def _cut_into_pieces(length: int, context: int, dtype: torch.dtype) -> list[Piece]:
    """Cut a chunk with a prefix so that no mask is larger than MASK_ELEMENTS."""
    prefix, step = context - length, max(1, MASK_ELEMENTS // context)
    pieces = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        keys = prefix + stop
        hidden = torch.arange(keys) > torch.arange(prefix + start, keys)[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        pieces.append(Piece(start, stop, keys, mask))
    return pieces


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
        own = slice(chunk.start, chunk.stop)
        queries = q[own].permute(1, 2, 0, 3)  # [K, G, T, D]
        if chunk.rows is None:
            keys, values = k[own].transpose(0, 1)[:, None], v[own].transpose(0, 1)[:, None]
            attended = F.scaled_dot_product_attention(
                queries, keys.expand_as(queries), values.expand_as(queries), is_causal=True, scale=scale
            )
            out[own] = attended.permute(2, 0, 1, 3)
            continue
        gathered = torch.index_select(pool, 0, chunk.rows, out=plan.scratch[: chunk.rows.shape[0]])
        keys, values = gathered.view(2, num_kv_heads, 1, -1, head_dim).expand(-1, -1, queries.shape[1], -1, -1)
        for piece in chunk.pieces:
            attended = F.scaled_dot_product_attention(
                queries[:, :, piece.start : piece.stop],
                keys[:, :, : piece.keys],
                values[:, :, : piece.keys],
                attn_mask=piece.mask,
                scale=scale,
            )
            out[chunk.start + piece.start : chunk.start + piece.stop] = attended.permute(2, 0, 1, 3)
    return out.view(tokens, num_heads, head_dim)


def _attend_decodes(q: Tensor, pool: Tensor, group: DecodeGroup, scratch: Tensor, scale: float) -> Tensor:
    """[S, K, G, D] -> [S, K, G, D], one query a sequence, G heads of a KV head as rows of one product."""
    size, num_kv_heads, _, head_dim = q.shape
    gathered = torch.index_select(pool, 0, group.rows, out=scratch[: group.rows.shape[0]])
    keys, values = gathered.view(2, size, num_kv_heads, -1, head_dim)[:, :, :, : group.length]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=group.mask, scale=scale)
