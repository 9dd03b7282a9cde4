"""Pooling: which of a step's hidden states become embeddings, and their sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ..scheduler.plan import StepPlan


class StepPooling:
    """The chunks of a plan that pool, by index, and which of the step's T tokens each of them wants."""

    def __init__(self, plan: StepPlan) -> None:
        self._counts: dict[int, int] = {}
        rows: list[NDArray[np.int64]] = []
        end = len(plan.decode_slots)
        for index, chunk in enumerate(plan.chunks):
            end += len(chunk.tokens)
            if count := chunk.num_pooled:
                self._counts[index] = count
                rows.append(np.arange(end - count, end))
        self.rows = torch.from_numpy(np.concatenate(rows)) if rows else None  # [P]

    def add(self, hidden: Tensor) -> dict[int, Tensor]:
        """The sum of each chunk's hidden states [hidden] in float32, where `hidden` [P, hidden] is those of `rows`."""
        parts = torch.split(hidden, [*self._counts.values()])
        return {index: part.sum(0, dtype=torch.float32) for index, part in zip(self._counts, parts, strict=True)}
