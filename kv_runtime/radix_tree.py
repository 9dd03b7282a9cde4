"""A compressed radix tree over token ids: which tokens' KV lies in which blocks.

A node covers the token positions [start, end) with a run of tokens and with the blocks of the block indices
`start // block_size` to `(end - 1) // block_size`. Nodes split at any token. Where a child starts inside a block,
its first block (the same one after a split, else a copy that its sequence made) stands in for its parent's last.
The tree holds one reference per node and block. It vouches for [start, end) only: what a sequence later appends to
a shared, partly filled block lies past every `end` that refers to it.

Eviction trims leaves from their tails, in the order that a policy (`eviction.py`) gives. A leaf whose last block has
an owner cannot give anything: it is *parked* outside the policy's list when eviction meets it and returns when that
block is released. Each step is paid for by an evicted block, or by the release that it answers. A use that ends
inside a node splits it, so that what nobody uses any more ages; what extends a leaf inherits its uses. With an
`Expiry` what has not been used for too long is forgotten when the tree is told to, whoever owns its blocks.

The pool hears of many changes at once, in `settle`; what is entered has an owner or is in the tree already, so
nothing is lost meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from ..errors import KVCacheError
from .node import NO_TOKENS, Node, common_prefix_length
from .pins import Pins
from .pool import NO_BLOCKS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .block_times import BlockWatch
    from .eviction import EvictionPolicy
    from .expiry import Expiry
    from .listener import CacheListener
    from .node import Namespace
    from .pool import BlockPool, Blocks, Int32Array


def _head(array: Int32Array, size: int) -> Int32Array:
    """Return the first entries, as a copy once a view would keep more than twice their memory alive."""
    view = array[:size]
    whole = view.base
    return view.copy() if isinstance(whole, np.ndarray) and whole.size > 2 * size else view


def _joined(arrays: list[Int32Array]) -> Int32Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class RadixTree:
    """Prefixes per namespace; see the module's docstring. Not thread-safe."""

    def __init__(
        self, pool: BlockPool, block_size: int, policy: EvictionPolicy, expiry: Expiry | None, watch: BlockWatch
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._roots: dict[Namespace, Node] = {}
        self._policy = policy
        self._expiry = expiry
        self.watch = watch
        self.listeners: list[CacheListener] = [watch]
        self.pins = Pins(pool, block_size)
        self._parked: OrderedDict[int, list[Node]] = OrderedDict()
        self._entered: list[Int32Array] = []  # blocks whose references the pool does not know of
        self._dropped: list[Int32Array] = []

    def match(self, tokens: Int32Array, namespace: Namespace) -> tuple[int, Int32Array, Node | None]:
        """Return the length of the longest cached prefix, its blocks and its last node.

        The last block may be partly covered. What is found is no use yet: that is `use`, of the node.
        """
        root = self._roots.get(namespace)
        if root is None:
            return 0, NO_BLOCKS, None
        path, position = self._walk(root, tokens)
        if not path:
            return 0, NO_BLOCKS, None
        size, node = self._block_size, path[-1]
        first = node.start // size
        parts = [node.blocks[: (position - 1) // size - first + 1]]
        while first:  # upwards: of a parent's blocks those before the ones that its child stands in for
            node = node.parent
            begin = node.start // size
            if begin < first:
                parts.append(node.blocks[: first - begin])
                first = begin
        return position, parts[0].copy() if len(parts) == 1 else np.concatenate(parts[::-1]), path[-1]

    def use(self, last: Node, position: int, hit: bool) -> None:
        """What a match found, up to `position` in the node `last`, is used now; `hit` if it is not to be computed.

        Since the match nodes may have been split, but none may have been removed.
        """
        path, node = [], last
        while node.namespace is None:
            if node.start < position:
                path.append(node)
            node = node.parent
        path.reverse()
        self._split_unused(path, position)
        if hit:
            self._policy.hit(path)
            self.watch.used(path)
        else:
            self._policy.touch(path)
        if self._expiry:
            self._expiry.touch(path)

    def count(self, tokens: Int32Array, namespace: Namespace, touch: bool) -> int:
        """Return the length of the longest cached prefix."""
        root = self._roots.get(namespace)
        if root is None:
            return 0
        path, position = self._walk(root, tokens)
        if touch:
            self._touch(path, position)
        return position

    def insert(self, tokens: Int32Array, blocks: Int32Array, namespace: Namespace) -> int:
        """Insert what is not there yet and return how many tokens that is; `settle` is to follow.

        `blocks[i]` must hold the KV of positions `i * block_size` onwards and have an owner. A leaf is extended in
        place; its partly filled last block gives way to the longer one.
        """
        root = self._roots.get(namespace)
        path, position = self._walk(root, tokens) if root else ([], 0)
        if position == tokens.size:
            self._touch(path, position)
            return 0
        first = position // self._block_size
        fresh_blocks = blocks[first:].copy()
        self._entered.append(fresh_blocks)
        if path and position < path[-1].end:
            path[-1] = self._split(path[-1], position)
        if path and not path[-1].children and not path[-1].pins:
            child = path[-1]
            self._extend(child, tokens, fresh_blocks)
        else:
            if root is None:
                root = self._roots[namespace] = Node(None, 0, NO_TOKENS, NO_BLOCKS)
                root.namespace = namespace
            parent = path[-1] if path else root
            child = Node(parent, position, tokens[position:].copy(), fresh_blocks)
            parent.children[tokens.item(position)] = child
            path.append(child)
        for listener in self.listeners:
            listener.stored(child, position)
        self._touch(path, tokens.size)
        return tokens.size - position

    def pin(self, tokens: Int32Array, namespace: Namespace) -> None:
        """Keep a prefix, all of which is in the tree, until `unpin`. Pinned twice it is pinned once."""
        key = (namespace, tokens.tobytes())
        if key in self.pins:
            return
        path, position = self._walk(self._roots[namespace], tokens)
        if position < path[-1].end:
            path[-1] = self._split(path[-1], position)
        for index in range(len(path) - 1, 0, -1):
            self._share_first_block(path[index - 1], path[index])
        self.settle()
        self.pins.add(key, path)
        self._touch(path, position)

    def _share_first_block(self, parent: Node, child: Node) -> None:
        """Let a node that ends inside a block, and is not pinned, hold there the block of the child that goes on."""
        if child.start % self._block_size and not parent.pins and parent.blocks[-1] != child.blocks[0]:
            self._dropped.append(parent.blocks[-1:])
            self._entered.append(child.blocks[:1])
            parent.blocks = np.append(parent.blocks[:-1], child.blocks[:1])

    def unpin(self, tokens: Int32Array, namespace: Namespace) -> bool:
        """Let go of a pinned prefix; False if it is none. It stays cached until it is evicted or expires."""
        key = (namespace, tokens.tobytes())
        if key not in self.pins:
            return False
        nodes, unowned = self.pins.remove(key)
        if nodes and not nodes[0].children and nodes[0] not in self._policy.listed:
            self._policy.relist(nodes[0])
        for blocks in unowned:
            self.unpark(blocks)
        return True

    def evict(self, num_free: int) -> int:
        """Trim leaves from their tails, as the policy orders them, until `num_free` blocks are free; return the gain.

        Blocks with owners are left in peace, unless evictable blocks can only be reached by forgetting them: then
        the tree drops its own reference, and their owners keep theirs.

        Raises:
            KVCacheError: the tree is empty before that: `num_free` exceeds the pool's free and evictable blocks.
        """
        pool, before = self._pool, self._pool.num_free
        while pool.num_free < num_free:
            if not self._trim_tails(num_free - pool.num_free):
                self._forget_parked()
            self.settle()
        return pool.num_free - before

    def _trim_tails(self, count: int) -> int:
        """Drop `count` blocks without owners, fewer if the policy has no leaf left; return how many."""
        owners, missing = self._pool.owners, count
        while missing and (node := self._policy.victim()):
            unowned = owners.count_trailing_zeros(node.blocks[-missing:])
            if unowned:
                self._policy.trim(node)
                if unowned == node.blocks.size:
                    self._policy.unlist(node)
                self._trim(node, unowned)
                missing -= unowned
            else:
                self._park(node)
        return count - missing

    def forget_expired(self) -> int:
        """Drop what has expired; return how many blocks became free by it. Those with owners stay with them."""
        before = self._pool.num_free
        for leaf in self._expiry.expired() if self._expiry else ():
            if leaf.pins:
                self._postpone_expiry(leaf)
                continue
            if leaf.parked_on >= 0:
                self._unpark_one(leaf)
            else:
                self._policy.unlist(leaf)
            self._trim(leaf, leaf.blocks.size)
        self.settle()
        return self._pool.num_free - before

    def _postpone_expiry(self, node: Node) -> None:
        path = []
        while node.namespace is None:
            path.append(node)
            node = node.parent
        if self._expiry:
            self._expiry.touch(path[::-1])

    def settle(self) -> None:
        """Tell the pool which references the tree has taken and dropped."""
        if self._entered:
            self._pool.cache(_joined(self._entered))
            self._entered = []
        if self._dropped:
            self._pool.uncache(_joined(self._dropped))
            self._dropped = []

    def unpark(self, blocks: Blocks) -> None:
        """Make the leaves that waited for these blocks evictable again."""
        if not self._parked:
            return
        for block in blocks:
            for node in self._parked.pop(int(block), ()):
                node.parked_on = -1
                self._policy.relist(node)

    def clear(self) -> int:
        """Forget everything; return how many blocks became free by it."""
        for listener in self.listeners:
            listener.cleared()
        self.pins.clear()
        self._roots.clear()
        self._policy.clear()
        if self._expiry:
            self._expiry.clear()
        self._parked.clear()
        return self._pool.uncache_all()

    def _walk(self, root: Node, tokens: Int32Array) -> tuple[list[Node], int]:
        """Return the nodes below the root that share tokens with `tokens`, and how many tokens that is in all."""
        path: list[Node] = []
        node, position = root, 0
        while position < tokens.size:
            child = node.children.get(tokens.item(position))
            if child is None:
                break
            path.append(child)
            node = child
            if child.tokens.size == 1:
                position += 1
                continue
            position += common_prefix_length(child.tokens, tokens[position:])
            if position < child.end:
                break
        return path, position

    def _touch(self, path: list[Node], position: int) -> None:
        if path:
            self._split_unused(path, position)
            self._policy.touch(path)
            if self._expiry:
                self._expiry.touch(path)

    def _split_unused(self, path: list[Node], position: int) -> None:
        """Before a use up to `position` is told to the policy, cut off what it leaves of the last node."""
        last = path[-1]
        if last.end - position >= self._block_size:
            path[-1] = self._split(last, position)
            self.settle()
        elif last.parked_on >= 0:
            self._unpark_one(last)

    def _split(self, node: Node, position: int) -> Node:
        """Cut a node at a token inside it; return the new upper part, which the policy has not been told of."""
        size, parent = self._block_size, node.parent
        cut = position - node.start
        first = node.start // size
        covered = (position - 1) // size - first + 1
        upper = Node(parent, node.start, node.tokens[:cut].copy(), node.blocks[:covered].copy())
        if position % size:
            self._entered.append(upper.blocks[-1:])
        parent.children[upper.tokens.item(0)] = upper
        node.parent, node.start = upper, position
        node.tokens, node.blocks = node.tokens[cut:].copy(), node.blocks[position // size - first :].copy()
        upper.children[node.tokens.item(0)] = node
        upper.hits, upper.used_at, upper.pins = node.hits, node.used_at, node.pins
        if node.pins and position % size:
            self.pins.own(upper.blocks[-1:])
        self.watch.split(node, upper)
        return upper

    def _extend(self, leaf: Node, tokens: Int32Array, blocks: Int32Array) -> None:
        """Let a leaf end where `tokens` do, where `blocks[0]` is the block that holds the leaf's end."""
        kept = leaf.end // self._block_size - leaf.start // self._block_size
        if kept < leaf.blocks.size:
            self._dropped.append(leaf.blocks[kept:])
        leaf.tokens = tokens[leaf.start :].copy()
        leaf.blocks = np.concatenate((leaf.blocks[:kept], blocks))
        leaf.end = tokens.size

    def _trim(self, leaf: Node, count: int) -> None:
        """Drop a leaf's last `count` blocks and the tokens in them; all of them is the leaf itself."""
        kept = leaf.blocks.size - count
        end = (leaf.start // self._block_size + kept) * self._block_size if kept else leaf.start
        for listener in self.listeners:
            listener.removed(leaf, end)
        self._dropped.append(leaf.blocks[kept:])
        if kept:
            leaf.end = end
            leaf.tokens = _head(leaf.tokens, leaf.end - leaf.start)
            leaf.blocks = _head(leaf.blocks, kept)
        else:
            self._remove(leaf)

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        del parent.children[leaf.tokens.item(0)]
        if self._expiry:
            self._expiry.forget(leaf)
        if not parent.children:
            if parent.namespace is not None:
                del self._roots[parent.namespace]
            else:
                self._policy.relist(parent)

    def _park(self, leaf: Node) -> None:
        self._policy.unlist(leaf)
        if leaf.pins:
            return
        leaf.parked_on = leaf.blocks.item(-1)
        self._parked.setdefault(leaf.parked_on, []).append(leaf)

    def _unpark_one(self, leaf: Node) -> None:
        waiting = self._parked[leaf.parked_on]
        waiting.remove(leaf)
        if not waiting:
            del self._parked[leaf.parked_on]
        leaf.parked_on = -1

    def _forget_parked(self) -> None:
        """Drop the owned tail of the leaf that was parked first, so that what is above it can be evicted."""
        if not self._parked:
            raise KVCacheError("no evictable block is left in the prefix tree, though the pool counted some")
        leaf = next(iter(self._parked.values()))[0]
        self._unpark_one(leaf)
        unowned = np.flatnonzero(self._pool.owners.counts[leaf.blocks] == 0)
        kept = int(unowned[-1]) + 1 if unowned.size else 0
        if kept:
            self._policy.relist(leaf)
        self._trim(leaf, leaf.blocks.size - kept)

    def nodes(self) -> Iterator[Node]:
        """Yield every node but the roots, parents before their children."""
        waiting = list(self._roots.values())
        while waiting:
            node = waiting.pop()
            if node.namespace is None:
                yield node
            waiting.extend(node.children.values())
