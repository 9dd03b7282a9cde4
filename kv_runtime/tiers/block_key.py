"""What names a block below the tree: its hash, which covers all tokens before it, and its own tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..block_hash import chain_hashes, root_hash

if TYPE_CHECKING:
    from ..node import Namespace
    from ..pool import Int32Array


class BlockKey(NamedTuple):
    """A whole block's name. Equal keys hold equal KV: a hit compares hashes and tokens."""

    digest: bytes
    parent: bytes  # the digest of the block before, or of the namespace
    tokens: bytes  # the block's own, int32 little endian


def chain_keys(parent: bytes, tokens: Int32Array, block_size: int) -> list[BlockKey]:
    """Name the whole blocks of `tokens` [T] that follow the block with digest `parent`."""
    raw, step = tokens.astype("<i4", copy=False).tobytes(), 4 * block_size
    keys = []
    for index, digest in enumerate(chain_hashes(parent, tokens, block_size)):
        keys.append(BlockKey(digest, parent, raw[index * step : (index + 1) * step]))
        parent = digest
    return keys


def prefix_keys(namespace: Namespace, tokens: Int32Array, block_size: int) -> list[BlockKey]:
    """Name the whole blocks of a prompt's `tokens` [T], from its first."""
    return chain_keys(root_hash(namespace), tokens, block_size)
