"""Which tokens the rows of a step may choose, as bits. Shape letters: R rows, G guided ones, W words, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from .penalties import to_device

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(slots=True)
class TokenMask:
    """Row `rows[i]` of a step may choose token t where bit t % 32 of `bits[i, t // 32]` is set."""

    rows: NDArray[np.int64]  # [G]
    bits: NDArray[np.int32]  # [G, W]
    _forbidden: Tensor | None = None  # [G, V] bool

    def unpack(self, vocab_size: int) -> None:
        """Do on this thread, for logits on the host, what takes longest."""
        forbidden = np.unpackbits((~self.bits).view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        self._forbidden = torch.from_numpy(forbidden.view(bool))

    def apply(self, logits: Tensor) -> None:
        """Set logits [R, V] of all other tokens to minus infinity, in place, without waiting for the device."""
        forbidden = self._unpack_on(logits) if self._forbidden is None else self._forbidden
        never = torch.full((), -torch.inf, device=logits.device)
        if len(self.rows) == len(logits):
            torch.where(forbidden, never, logits, out=logits)  # a CPU takes half the time of masked_fill_
        else:
            index = to_device(self.rows, logits.device)
            logits[index] = torch.where(forbidden, never, logits[index])

    def _unpack_on(self, logits: Tensor) -> Tensor:
        octets = to_device(self.bits.view(np.uint8), logits.device)
        bit = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8, device=logits.device)
        return ((octets[:, :, None] & bit) == 0).flatten(1)[:, : logits.shape[1]]
