"""How blocks get out of the KV pool and into it: what an executor offers to the tiers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..pool import Int32Array

    Bytes = NDArray[np.uint8]
    Rows = NDArray[np.int64]


class BlockIO(Protocol):
    """Copies whole blocks, all layers of each, between the pool and host memory. Callable from any thread.

    `blocks` [n] are ids of the pool; `rows` [n] say which rows of a `buffer` [R, block_bytes] they go to or come from.
    """

    block_bytes: int
    layout: str  # element type and dimensions of a block: equal layouts hold equal KV in equal bytes

    def allocate(self, count: int) -> Bytes:
        """Host memory [count, block_bytes] that copies are fast with."""
        ...

    def read(self, blocks: Int32Array, buffer: Bytes, rows: Rows) -> None:
        """Copy blocks out. Steps launched later write to them afterwards; `synchronize` waits for the bytes."""
        ...

    def write(self, blocks: Int32Array, buffer: Bytes, rows: Rows) -> None:
        """Copy blocks in; returns when the bytes are there for every step launched from now on."""
        ...

    def synchronize(self) -> None:
        """Wait until everything that was read is in host memory."""
        ...

    def fence(self) -> None:
        """Wait for the steps launched so far: one may still write to the block of a row that has ended."""
        ...


class NoBytesIO:
    """For a model that has no KV: blocks of no bytes."""

    block_bytes = 0
    layout = "none"

    def allocate(self, count: int) -> Bytes:
        return np.empty((count, 0), np.uint8)

    def read(self, blocks: Int32Array, buffer: Bytes, rows: Rows) -> None:
        """There is nothing in them."""

    def write(self, blocks: Int32Array, buffer: Bytes, rows: Rows) -> None:
        """There is nothing in them."""

    def synchronize(self) -> None:
        """Nothing is under way."""

    def fence(self) -> None:
        """Steps are over when they are launched."""
