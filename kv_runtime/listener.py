"""Who wants to know what the prefix tree stores and removes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .node import Node


class CacheListener(Protocol):
    """Hears of each change of the tree under the cache's lock: it must not call the cache, block or raise.

    A change concerns the token positions from `start` to the node's end. The KV of position p lies in the node's block
    `p // block_size - node.start // block_size`; the rest of the first of these blocks may be an earlier position's,
    whether of this node or not. `node.prefix()` gives the namespace and all tokens up to the node's end. The node is as
    told only during the call.
    """

    def stored(self, node: Node, start: int) -> None:
        """These tokens are reusable from now on; whoever computed them still owns the blocks.

        If they begin inside a block, their first block has taken the place of the one that held its first tokens.
        """

    def removed(self, node: Node, start: int) -> None:
        """These tokens are about to be forgotten. Their blocks keep their KV until the call returns, longer if owned.

        `start` begins a block or is the node's own.
        """

    def cleared(self) -> None:
        """Everything is about to be forgotten."""
