"""What changes logits before temperature: bias, forbidden stop tokens, penalties. Everything is written sparsely.

A step touches only the logits of tokens that are named or already in the sequence: a few thousand of V. Where rows are
of different lengths, a short one repeats its last entry, and every change is the same however often it is written.
Shape letters: R rows, V vocabulary, S slots, C columns of a table, L entries of the longest row in the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Copy a small host array without making the host wait for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class SlotTable:
    """[S, C] on the device, where C grows to the longest row ever written. No memory before the first write."""

    def __init__(self, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros((num_slots, 0), dtype=dtype, device=device)

    def reserve(self, columns: int) -> None:
        """Make room for `columns` entries per slot."""
        have = self.data.shape[1]
        if columns > have:
            wider = self.data.new_zeros((self.data.shape[0], max(columns, 2 * have)))
            wider[:, :have] = self.data
            self.data = wider

    def write(self, slot: int, values: NDArray[np.generic]) -> None:
        """Set the first entries of the slot's row."""
        self.reserve(len(values))
        self.data[slot, : len(values)] = to_device(values, self.data.device)

    def read(self, slots: Tensor, starts: Tensor, ends: Tensor, longest: int) -> Tensor:
        """slots, starts, ends [R] int64 -> entries [R, longest] from start on; from end on the last one repeats.

        Every row must have start < end.
        """
        columns = starts[:, None] + torch.arange(longest, device=slots.device)
        return self.data[slots[:, None], torch.minimum(columns, ends[:, None] - 1)]


class NamedTokens:
    """Tokens named by a request, and what is added to their logits: logit_bias, or -inf for what is forbidden."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._tokens = SlotTable(num_slots, torch.int64, device)
        self._added = SlotTable(num_slots, torch.float32, device)
        self._counts = np.zeros(num_slots, np.int64)

    def write(self, slot: int, added: Mapping[int, float]) -> None:
        """Name the slot's tokens; `added` must not be empty."""
        self._counts[slot] = len(added)
        self._tokens.write(slot, np.fromiter(added.keys(), np.int64, len(added)))
        self._added.write(slot, np.fromiter(added.values(), np.float32, len(added)))

    def apply(self, logits: Tensor, rows: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """Change logits [R, V] in place at `rows`, which belong to `slots`."""
        counts = self._counts[slots]
        index = to_device(np.stack((rows, slots, np.zeros_like(counts), counts)), logits.device)
        span = (index[1], index[2], index[3], int(counts.max()))
        where = index[0][:, None], self._tokens.read(*span)
        logits[where] = logits[where] + self._added.read(*span)


class TokenHistory:
    """Prompt and output tokens of the slots that have penalties, kept on the device.

    The token drawn in one step is appended there before the host has seen it, so the next step can be launched ahead.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._tokens = SlotTable(num_slots, torch.int64, device)
        self._prompt_lengths = np.zeros(num_slots, np.int64)

    def write(self, slot: int, prompt: Sequence[int] | NDArray[np.int32], output: Sequence[int]) -> None:
        """Start the slot's history; `output` is what was drawn before a preemption."""
        self._prompt_lengths[slot] = len(prompt)
        self._tokens.write(slot, np.concatenate((np.asarray(prompt, np.int64), np.asarray(output, np.int64))))

    def append(
        self, tokens: Tensor, rows: NDArray[np.int64], slots: NDArray[np.int64], steps: NDArray[np.int64]
    ) -> None:
        """Record tokens[rows] as the output tokens number `steps` (0-based) of `slots`."""
        columns = self._prompt_lengths[slots] + steps
        self._tokens.reserve(int(columns.max()) + 1)
        index = to_device(np.stack((rows, slots, columns)), tokens.device)
        self._tokens.data[index[1], index[2]] = tokens[index[0]]

    def penalize_repetition(
        self,
        logits: Tensor,
        rows: NDArray[np.int64],
        slots: NDArray[np.int64],
        steps: NDArray[np.int64],
        penalties: NDArray[np.float64],
    ) -> None:
        """Divide positive and multiply negative logits of all tokens seen, prompt included, by penalties [R]; in place.

        Formula: Keskar et al., CTRL, arXiv:1909.05858, section 4.1, with transformers' treatment of negative logits.
        """
        ends = self._prompt_lengths[slots] + steps
        index = to_device(np.stack((rows, slots, np.zeros_like(ends), ends)), logits.device)
        penalty = to_device(penalties.astype(np.float32), logits.device)[:, None]
        where = index[0][:, None], self._tokens.read(index[1], index[2], index[3], int(ends.max()))
        seen = logits[where]
        logits[where] = torch.where(seen < 0, seen * penalty, seen / penalty)

    def penalize_output(
        self,
        logits: Tensor,
        rows: NDArray[np.int64],
        slots: NDArray[np.int64],
        steps: NDArray[np.int64],
        presence: NDArray[np.float64],
        frequency: NDArray[np.float64],
    ) -> None:
        """Subtract presence + frequency * count for every token drawn so far, in place; every step must be > 0."""
        starts = self._prompt_lengths[slots]
        index = to_device(np.stack((rows, slots, starts, starts + steps)), logits.device)
        penalty = to_device(np.stack((presence, frequency)).astype(np.float32), logits.device)[:, :, None]
        longest = int(steps.max())
        tokens = self._tokens.read(index[1], index[2], index[3], longest)
        where = index[0][:, None], tokens
        logits[where] = logits[where] - penalty[0]
        counted = torch.arange(longest, device=logits.device) < (index[3] - index[2])[:, None]
        flat = index[0][:, None] * logits.shape[1] + tokens
        logits.view(-1).scatter_add_(0, flat.view(-1), torch.where(counted, -penalty[1], 0.0).view(-1))
