"""Whose prompts, and whose decoding rows, a step computes first where tenants share its room for them. No torch."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


class TenantAccounts:
    """What tenants have had of the steps, divided by their weights.

    One whose first prompt comes, or comes again, starts where the others with prompts are: absence earns no credit.
    This is start-time fair queueing (Goyal et al., 1996); a prompt's length is the share of a step that it takes.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Tenants without a weight have 1."""
        self._weights = weights
        self._had: dict[str, float] = {}  # of those with prompts to compute, and of others that are above the level
        self._level = 0.0  # where somebody who comes starts

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _had_by(self, tenant: str) -> float:
        return max(self._had.get(tenant, self._level), self._level)

    def _meet(self, present: Collection[str]) -> None:
        """These have prompts to compute."""
        known = [had for tenant, had in self._had.items() if tenant in present]
        self._level = max(self._level, min(known, default=self._level))
        self._had = {tenant: had for tenant, had in self._had.items() if tenant in present or had > self._level}
        for tenant in present:
            self._had[tenant] = self._had_by(tenant)

    def take(self, tenant: str, share: float) -> None:
        """So much of a step is for a tenant."""
        self._had[tenant] = self._had_by(tenant) + share / self._weight(tenant)


class PromptTurns(TenantAccounts):
    """The tenant whose prompts have had the least is next."""

    def order(self, tenants: Sequence[str], shares: Sequence[float], limit: int) -> list[int]:
        """The places of the first `limit` prompts in turn.

        Each has its tenant, and which share of a step it takes if it is computed as far as it can be. Those of one
        tenant stay in order.
        """
        queues: dict[str, list[int]] = {}
        for place, tenant in enumerate(tenants):
            queues.setdefault(tenant, []).append(place)
        self._meet(queues)
        starts = [0.0] * len(tenants)  # what its tenant has had when it is a prompt's turn
        for tenant, places in queues.items():
            had, weight = self._had[tenant], self._weight(tenant)
            for place in places:
                starts[place] = had
                had += shares[place] / weight
        return sorted(chain.from_iterable(queues.values()), key=starts.__getitem__)[:limit]


class DecodeTurns(PromptTurns):
    """The same for rows that decode, in steps that have no room for all of them."""

    def serve(self, rows: Mapping[str, int], left_out: Collection[str]) -> None:
        """A step has so many rows of each tenant; these tenants have further ones.

        The others had all that they could use, and are where the level is: that they have few rows is no credit.
        """
        for tenant, count in rows.items():
            self.take(tenant, count)
        self._meet(left_out)
