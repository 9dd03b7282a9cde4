"""Time sharing: whose step it is when prompts and decoding rows both want the device."""

from __future__ import annotations


class TimeShare:
    """Takes turns: `prefill_steps` steps of prompts, then `decode_steps` of decoding rows, and so on.

    A kind that has nothing to compute is passed over; when it has, its turn comes after the other's.
    """

    def __init__(self, prefill_steps: int, decode_steps: int) -> None:
        self._steps = {True: prefill_steps, False: decode_steps}
        self._is_prefill = True
        self._taken = 0

    @property
    def decode_steps_for_each(self) -> float:
        """Steps of decoding rows for each of prompts."""
        return self._steps[False] / self._steps[True]

    @property
    def prefill_is_next(self) -> bool:
        if self._taken < self._steps[self._is_prefill]:
            return self._is_prefill
        return not self._is_prefill

    def take(self, prefill: bool, steps: int = 1) -> None:
        """So many steps of that kind were planned."""
        if prefill != self._is_prefill:
            self._is_prefill, self._taken = prefill, 0
        self._taken += steps
