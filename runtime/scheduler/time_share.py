"""Time sharing: whose step it is when prompts and decoding rows both want the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .prompt_turns import TenantAccounts

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


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

    @property
    def is_decoding(self) -> bool:
        """Whether it is the turn of decoding rows, and they have had a step of it."""
        return not self._is_prefill

    def take(self, prefill: bool, steps: int = 1) -> None:
        """So many steps of that kind were planned."""
        if prefill != self._is_prefill:
            self._is_prefill, self._taken = prefill, 0
        self._taken += steps


class StepShares(TenantAccounts):
    """What tenants have had of the steps of both kinds; one of decoding rows, while prompts wait, by their tenants."""

    def is_owed(self, tenants: Sequence[str], shares: Sequence[float], decoding: Collection[str]) -> bool:
        """Whether one of these prompts' tenants, with the share of a step that its prompt takes, has had no more than
        its own share of what they and the tenants that decode have had."""
        self._meet({*tenants})
        had = {tenant: self._had_by(tenant) for tenant in {*tenants, *decoding}}
        weights = {tenant: self._weight(tenant) for tenant in had}
        mean = sum(had[tenant] * weight for tenant, weight in weights.items()) / sum(weights.values())
        return any(had[tenant] + share / weights[tenant] <= mean for tenant, share in zip(tenants, shares, strict=True))
