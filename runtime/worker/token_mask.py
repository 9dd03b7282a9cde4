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

    def apply(self, logits: Tensor) -> None:
        """Set logits [R, V] of all other tokens to minus infinity, in place, without waiting for the device."""
        octets = to_device(self.bits.view(np.uint8), logits.device)
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        allowed = (octets[:, :, None] >> shifts).bitwise_and_(1).flatten(1)[:, : logits.shape[1]]
        if len(self.rows) == len(logits):
            logits.masked_fill_(allowed == 0, -torch.inf)
        else:
            index = to_device(self.rows, logits.device)
            logits[index] = logits[index].masked_fill(allowed == 0, -torch.inf)
