"""What must hold of a prefix tree at any moment between two calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import KVCacheError

if TYPE_CHECKING:
    from .node import Node
    from .radix_tree import RadixTree


def check_tree(tree: RadixTree) -> None:
    """Verify a tree's structure, its references and pins, its policy's list and the order of expiry.

    Raises:
        KVCacheError: naming the first thing that is wrong.
    """
    held = np.zeros(tree._pool.num_blocks, dtype=np.int64)
    tree._policy.check()
    tree.pins.check(tree.nodes())
    if tree._expiry:
        tree._expiry.check([*tree.nodes()])
    policy_list, listed, parked = tree._policy.listed, 0, 0
    for namespace, root in tree._roots.items():
        if not root.children or root.namespace != namespace:
            raise KVCacheError(f"the root of namespace {namespace} is empty or is that of {root.namespace}")
    for node in tree.nodes():
        _check_node(node, tree._block_size)
        np.add.at(held, node.blocks, 1)
        if node in policy_list:
            listed += 1
        elif not node.children and not node.pins:
            parked += 1
            if node not in tree._parked.get(node.parked_on, ()) or node.blocks.item(-1) != node.parked_on:
                raise KVCacheError(f"leaf {node} is neither listed for eviction nor parked on its last block")
            if not tree._pool.owners.counts[node.parked_on]:
                raise KVCacheError(f"leaf {node} waits for block {node.parked_on}, which nobody owns")
    if listed != len(policy_list) or parked != sum(map(len, tree._parked.values())):
        raise KVCacheError("the policy's list or the parked leaves hold a node that is not in the tree")
    wrong = held != tree._pool.tree.counts
    if wrong.any():
        block = int(wrong.argmax())
        counted = tree._pool.tree.counts[block]
        raise KVCacheError(f"block {block} is in {held[block]} tree nodes, but {counted} references are counted")


def _check_node(node: Node, size: int) -> None:
    parent = node.parent
    problem = None
    if parent.end != node.start:
        problem = "does not begin where its parent ends"
    elif node.end <= node.start or node.tokens.size != node.end - node.start:
        problem = f"holds {node.tokens.size} tokens"
    elif parent.children.get(node.tokens.item(0)) is not node:
        problem = "is not its parent's child under its first token"
    elif node.blocks.size != (node.end - 1) // size - node.start // size + 1:
        problem = f"holds {node.blocks.size} blocks of {size} tokens"
    if problem:
        raise KVCacheError(f"tree node {node} {problem}")
