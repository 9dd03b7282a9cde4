"""The policy `fair_share`: tenants share what is served, and what there is to serve it with. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING

from .policies import FirstComeFirstServed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ...records import Sequence
    from .lease import Rank

_OUTPUT_PRICE = 2  # what an output token counts in prompt tokens, as in VTC


@dataclass(slots=True)
class _Account:
    """What a tenant has had, in prompt tokens; an output token counts as `_OUTPUT_PRICE` of them."""

    served: float  # divided by the tenant's weight
    promised: int = 0  # for the leases that are out: the prompt and all the output that there may be
    slots: int = 0  # of those leases
    held: int = 0  # tokens of KV that these leases may come to need
    ahead: dict[int, int] = field(default_factory=dict)  # the same, granted before a lease, by id of the sequence
    remembered: bool = False  # listed to be forgotten once the level has come up to it


class FairShare:
    """The tenant that has the least, by tokens served and promised and divided by its weight, is next.

    Tenants without a weight have 1. A lease promises its prompt and `max_new_tokens`; when it comes back, what was
    computed has been served. A tenant that comes, or comes back after a while, starts at the level where the others
    are: idling earns no credit. What is served raises the level by an equal share for each tenant that waits or runs,
    so that who waits on is not passed by new tenants for ever.

    A tenant that holds no slot, or less than its share of all, gets one even if others hold them all: `workers` with
    `max_batch_size` each are shared, and there are twice as many. So a flood makes nobody wait until it is done with a
    slot; those who hold more wait until the sum is below the bound again. Where KV blocks are what it lacks, it claims
    them: rows of tenants that hold more (in tokens that their leases may come to, divided by the weight) are preempted,
    the last granted first; so they are when a step runs out of blocks. Steps compute prompts by `PromptTurns`,
    and where more rows decode than a step has room for, these go by `DecodeTurns`.

    So with half of the weight a tenant can have half of the slots, of the KV pool and of each step's room for prompts,
    whatever the other sends. Its slowest first token comes at most twice as late, and six steps, as beside a tenant
    that sends as much for its weight, if the pool holds four of the largest requests (in a smaller one what a tenant
    may have is a request or none, and who comes second waits for all of the first) and `max_step_tokens` is at least
    twice `max_batch_size` (rows that decode come first; in mode TIME_SHARE see `StepShares`). Random loads say so,
    1,240 in each mode (docs/performance.md); it is no proof, and one of TIME_SHARE is known that is a step beyond.

    These are the virtual token counters, with length prediction, of Sheng et al., "Fairness in Serving Large Language
    Models", OSDI 2024. They bound what two tenants that both wait are served differently, by what one batch holds.
    """

    def __init__(self, max_batch_size: int, workers: int, weights: Mapping[str, float]) -> None:
        self.max_slots: float = max_batch_size
        self._shared_slots = max_batch_size * workers
        self._slots = 0  # of all leases
        self._weights = weights
        self._queues: dict[str, FirstComeFirstServed] = {}  # of the tenants that wait
        self._accounts: dict[str, _Account] = {}
        self._level = 0.0  # at least what the tenant of the latest grant had been served
        self._remembered: list[tuple[float, str]] = []  # a heap, by what they had been served then
        self._present_weight = 0.0  # of the tenants that wait or have leases out
        self._lock = Lock()  # around the accounts, the level and which tenants wait

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return chain.from_iterable(self._queues.values())

    def add(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        if tenant not in self._queues:
            with self._lock:
                self._queues[tenant] = FirstComeFirstServed()
                account = self._accounts.setdefault(tenant, _Account(self._level))
                if not account.promised:
                    self._present_weight += self._weight(tenant)
                account.served = max(account.served, self._level)
        self._queues[tenant].add(sequence)

    def in_order(self) -> Iterator[Sequence]:
        turns = {tenant: iter(queue) for tenant, queue in self._queues.items()}
        had = {tenant: self._had(tenant) for tenant in turns}
        slots = {tenant: self._accounts[tenant].slots for tenant in turns}
        free = self._shared_slots - self._slots
        while turns:
            tenant = min(turns, key=had.__getitem__)
            sequence = next(turns[tenant], None)
            count = 0 if sequence is None else sequence.sampling.n
            if sequence is None or (count > free and not self._is_below_share(tenant, count, slots[tenant])):
                del turns[tenant]
                continue
            yield sequence
            free -= count
            slots[tenant] += count
            had[tenant] += _promise(sequence) / self._weight(tenant)

    def remove(self, sequences: list[Sequence]) -> None:
        by_tenant: dict[str, list[Sequence]] = {}
        for sequence in sequences:
            by_tenant.setdefault(sequence.request.tenant, []).append(sequence)
        for tenant, gone in by_tenant.items():
            self._queues[tenant].remove(gone)
            if not len(self._queues[tenant]):
                with self._lock:
                    del self._queues[tenant]
                    self._leave_if_done(tenant)

    def rank(self, sequence: Sequence) -> Rank:
        """The KV that the tenant may need for its leases before this one, then what it has been served.

        So of two tenants the one that holds more has those it was granted last preempted first.
        """
        tenant = sequence.request.tenant
        account, weight = self._accounts[tenant], self._weight(tenant)
        return account.ahead.get(id(sequence), account.held) / weight, account.served

    def claimants(self) -> Iterator[Sequence]:
        heads = [next(iter(queue)) for queue in self._queues.values()]
        below = [head for head in heads if self._is_below_share(head.request.tenant, head.sampling.n)]
        return iter(sorted(below, key=self.rank))

    def charge(self, sequence: Sequence) -> None:
        with self._lock:
            account = self._accounts[sequence.request.tenant]
            self._raise_level(account.served)
            account.promised += _promise(sequence)
            account.slots += sequence.sampling.n
            self._slots += sequence.sampling.n
            account.ahead[id(sequence)] = account.held
            account.held += _kv_tokens(sequence)

    def settle(self, sequence: Sequence, used: bool) -> None:
        tenant = sequence.request.tenant
        with self._lock:
            account = self._accounts[tenant]
            if used:
                prompt = len(sequence.prompt_tokens) - sequence.prefix_hit_tokens
                output = sum(len(choice.output_tokens) for choice in sequence.choices)
                cost, weight = prompt + _OUTPUT_PRICE * output, self._weight(tenant)
                account.served += cost / weight
                self._raise_level(self._level + cost / max(self._present_weight, weight))  # the sum is a rounded one
            if not self._queues:  # what anybody was served now is at nobody's expense
                self._raise_level(account.served)
            account.slots -= sequence.sampling.n
            self._slots -= sequence.sampling.n
            self._let_go(account, sequence)
            account.promised -= _promise(sequence)  # last: until then nobody forgets the account
            self._leave_if_done(tenant)

    @staticmethod
    def _let_go(account: _Account, sequence: Sequence) -> None:
        tokens, earlier = _kv_tokens(sequence), account.ahead.pop(id(sequence))
        account.held -= tokens
        for other, ahead in account.ahead.items():
            if ahead > earlier:
                account.ahead[other] = ahead - tokens

    def _leave_if_done(self, tenant: str) -> None:
        """A tenant that neither waits nor runs is absent; forget it, if it would start where it stands."""
        account = self._accounts.get(tenant)
        if account is None or account.promised or tenant in self._queues:
            return
        self._present_weight -= self._weight(tenant)
        self._forget_or_remember(tenant, account)

    def _forget_or_remember(self, tenant: str, account: _Account) -> None:
        """Forget an absent tenant that would start where it stands, the others once that is so: O(log accounts)."""
        if account.served > self._level:
            if not account.remembered:
                account.remembered = True
                heappush(self._remembered, (account.served, tenant))
        else:
            del self._accounts[tenant]

    def _raise_level(self, level: float) -> None:
        self._level = max(self._level, level)
        while self._remembered and self._remembered[0][0] <= self._level:
            _, tenant = heappop(self._remembered)
            account = self._accounts[tenant]
            account.remembered = False
            if not account.promised and tenant not in self._queues:
                self._forget_or_remember(tenant, account)

    def _is_below_share(self, tenant: str, count: int, slots: int | None = None) -> bool:
        """Whether a tenant that holds none, or so many slots, has no more than its share, rounded up, with `count`
        others: of all, among the tenants that are here."""
        slots = self._accounts[tenant].slots if slots is None else slots
        weight = self._weight(tenant)
        return not slots or slots + count < self._shared_slots * weight / max(self._present_weight, weight) + 1

    def _had(self, tenant: str) -> float:
        account = self._accounts[tenant]
        return account.served + account.promised / self._weight(tenant)

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)


def _promise(sequence: Sequence) -> int:
    sampling = sequence.sampling
    return len(sequence.prompt_tokens) + _OUTPUT_PRICE * sampling.max_new_tokens * sampling.n


def _kv_tokens(sequence: Sequence) -> int:
    sampling = sequence.sampling
    return len(sequence.prompt_tokens) + sampling.max_new_tokens * sampling.n
