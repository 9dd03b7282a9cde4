"""The nodes of the prefix tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .pool import Int32Array

Namespace = tuple[str, str]
NO_TOKENS: Int32Array = np.empty(0, dtype=np.int32)


class Node:
    """A run of tokens and its blocks; both arrays are replaced, never written to. A root is its own parent."""

    __slots__ = (
        "blocks",
        "children",
        "end",
        "hits",
        "namespace",
        "parent",
        "parked_on",
        "pins",
        "start",
        "tokens",
        "used_at",
    )

    def __init__(self, parent: Node | None, start: int, tokens: Int32Array, blocks: Int32Array) -> None:
        self.parent = parent or self
        self.start = start
        self.end = start + tokens.size
        self.tokens = tokens
        self.blocks = blocks
        self.children: dict[int, Node] = {}  # by first token
        self.parked_on = -1  # the block whose release takes this leaf back into the policy's list
        self.namespace: Namespace | None = None  # set on roots
        self.pins = 0  # pinned prefixes that it is a part of
        self.hits = 0  # requests that did not have to compute it
        self.used_at = 0.0  # by the policy's clock

    def root_namespace(self) -> Namespace:
        """Return the namespace of the root above, O(depth)."""
        node = self
        while node.namespace is None:
            node = node.parent
        return node.namespace

    def prefix(self) -> tuple[Namespace, Int32Array]:
        """Return the namespace and all tokens [end] up to the node's end, O(end)."""
        runs, node = [], self
        while node.namespace is None:
            runs.append(node.tokens)
            node = node.parent
        return node.namespace, np.concatenate([NO_TOKENS, *reversed(runs)])

    def tokens_from(self, begin: int) -> Int32Array:
        """Return the tokens [begin, end) of the prefix that ends with this node, of which `start` may come later."""
        runs, node = [self.tokens[max(0, begin - self.start) :]], self
        while node.start > begin:
            node = node.parent
            runs.append(node.tokens[max(0, begin - node.start) :])
        return np.concatenate(runs[::-1])

    def full_blocks(self, start: int, block_size: int) -> tuple[int, list[int]]:
        """Return the blocks whose last token is one of this node's from `start` on, and before them the index of the
        first."""
        first, end, base = start // block_size, self.end // block_size, self.start // block_size
        return first, self.blocks[first - base : max(first, end) - base].tolist()

    def block_before(self, begin: int, block_size: int) -> int:
        """Return the block of the prefix that ends at `begin`, the end of a whole block and more than 0."""
        node = self
        while node.start >= begin:
            node = node.parent
        block: int = node.blocks.item(begin // block_size - 1 - node.start // block_size)
        return block

    def __str__(self) -> str:
        blocks = ", ".join(map(str, self.blocks[:4])) + (", ..." if self.blocks.size > 4 else "")
        return f"[{self.start}, {self.end}) in blocks [{blocks}]"


def common_prefix_length(a: Int32Array, b: Int32Array) -> int:
    """Return how many leading tokens are equal; looks little further than the first difference."""
    size = min(a.size, b.size)
    begin, chunk = 0, 512
    while begin < size:
        stop = min(begin + chunk, size)
        first: int = (a[begin:stop] != b[begin:stop]).tobytes().find(True)
        if first >= 0:
            return begin + first
        begin, chunk = stop, chunk * 4
    return size
