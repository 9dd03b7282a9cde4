"""The DDR tier: blocks in host memory, the coldest given up first."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .block_io import Bytes
    from .block_key import BlockKey


class HostBlock:
    """A block in row `row` of the tier's buffer. While it is pinned it is not given up."""

    __slots__ = ("filled", "is_saved", "key", "pins", "row")

    def __init__(self, key: BlockKey, row: int, is_saved: bool) -> None:
        self.key = key
        self.row = row
        self.pins = 0
        self.filled = False  # False: its copy is still under way
        self.is_saved = is_saved  # the tier below has it too


class HostTier:
    """`capacity` blocks in `buffer` [capacity, block_bytes], named by key. Not thread-safe: `KVTiers` locks.

    What the tier below has as well is given up first, then the rest; of each the least recently used one.
    """

    def __init__(self, buffer: Bytes) -> None:
        self.capacity = len(buffer)
        self.buffer = buffer
        self.lost_blocks = 0  # given up although no tier below had them
        self._blocks: dict[bytes, HostBlock] = {}
        self._free = list(range(self.capacity - 1, -1, -1))
        self._saved: OrderedDict[bytes, HostBlock] = OrderedDict()  # unpinned ones, the coldest first
        self._unsaved: OrderedDict[bytes, HostBlock] = OrderedDict()
        self.on_forgotten: Callable[[bytes], None] = lambda digest: None

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def num_unsaved(self) -> int:
        """Blocks, pinned ones not counted, that only this tier has."""
        return len(self._unsaved)

    def find(self, key: BlockKey) -> HostBlock | None:
        """Return the block of that name if its tokens are the same."""
        block = self._blocks.get(key.digest)
        return block if block is not None and block.key == key else None

    def touch(self, block: HostBlock) -> None:
        """It is used now."""
        if not block.pins:
            self._order(block).move_to_end(block.key.digest)

    def reserve(self, key: BlockKey, is_saved: bool) -> HostBlock | None:
        """Take a row for a block that is not here, pinned until it has been filled; None if every row is pinned."""
        if key.digest in self._blocks:  # other tokens of the same digest
            return None
        if self._free:
            row = self._free.pop()
        else:
            coldest = next(iter(self._saved.values()), None) or next(iter(self._unsaved.values()), None)
            if coldest is None:
                return None
            self.lost_blocks += not coldest.is_saved
            row = coldest.row
            self._forget(coldest)
        block = self._blocks[key.digest] = HostBlock(key, row, is_saved)
        block.pins = 1
        return block

    def pin(self, block: HostBlock) -> None:
        """Keep it until it is unpinned as often."""
        if not block.pins:
            del self._order(block)[block.key.digest]
        block.pins += 1

    def unpin(self, block: HostBlock) -> None:
        """Undo one `pin`; the last one makes it the most recently used."""
        block.pins -= 1
        if block.pins:
            return
        if block.filled:
            self._order(block)[block.key.digest] = block
        else:  # its copy failed
            del self._blocks[block.key.digest]
            self._free.append(block.row)

    def mark_saved(self, block: HostBlock) -> None:
        """The tier below has it now, too."""
        if not block.pins and not block.is_saved:
            del self._unsaved[block.key.digest]
            self._saved[block.key.digest] = block
        block.is_saved = True

    def mark_unsaved(self, digest: bytes) -> None:
        """The tier below has it no longer."""
        block = self._blocks.get(digest)
        if block is not None and block.is_saved:
            if not block.pins:
                del self._saved[digest]
                self._unsaved[digest] = block
                self._unsaved.move_to_end(digest, last=False)
            block.is_saved = False

    def drop(self, block: HostBlock) -> None:
        """Forget an unpinned block."""
        self._forget(block)
        self._free.append(block.row)

    def coldest_unsaved(self) -> HostBlock | None:
        """The block that would be lost next."""
        return next(iter(self._unsaved.values()), None)

    def _order(self, block: HostBlock) -> OrderedDict[bytes, HostBlock]:
        return self._saved if block.is_saved else self._unsaved

    def _forget(self, block: HostBlock) -> None:
        del self._order(block)[block.key.digest]
        del self._blocks[block.key.digest]
        self.on_forgotten(block.key.digest)

    def blocks(self) -> Iterator[HostBlock]:
        """Every block, in no order that matters."""
        return iter(self._blocks.values())

    def check(self) -> str | None:
        """Say what is wrong with the books, None if nothing is."""
        rows = sorted([block.row for block in self._blocks.values()] + self._free)
        listed = self._saved.keys() | self._unsaved.keys()
        if rows != list(range(self.capacity)):
            return f"{len(self._blocks)} blocks and {len(self._free)} free rows are not each row once"
        if listed != {digest for digest, block in self._blocks.items() if not block.pins}:
            return "the unpinned blocks are not those listed"
        return None
