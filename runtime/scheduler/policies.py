"""Policies: whose turn it is to get a lease, and who gives way when KV blocks run out. No torch."""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain, takewhile
from math import inf
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from ...config import SchedulerMode, SchedulerPolicy
from ...errors import RequestError
from .lease import may_reuse, namespace_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ...config import SchedulerConfig
    from ...kv_runtime.pool import Int32Array
    from ...records import Request, Sequence
    from .lease import Namespace

    CountCached = Callable[[list[tuple[Int32Array, Namespace]]], list[int]]

_DEFAULT_MAX_OVERTAKES = 64
_OUTPUT_PRICE = 2  # what an output token counts in prompt tokens, as in VTC


class Policy(Protocol):
    """Keeps the sequences that wait. `rank` and `settle` may be called from any thread, the rest from the flow's."""

    max_slots: float  # that one sequence may ever get

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, in no order that matters."""
        ...

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; it arrives later than all before it."""
        ...

    def in_order(self) -> Iterator[Sequence]:
        """Those that may get a lease now, the next one first. Nobody may be added or removed meanwhile."""
        ...

    def remove(self, sequences: list[Sequence]) -> None:
        """These wait no longer."""
        ...

    def rank(self, sequence: Sequence) -> float:
        """Of sequences that run the smallest rank is computed first and the largest preempted; equals as admitted."""
        ...

    def may_claim(self, sequence: Sequence) -> bool:
        """Whether for one that is next in order rows with larger ranks are preempted, if it lacks only KV blocks."""
        ...

    def charge(self, sequence: Sequence) -> None:
        """The sequence was granted a lease."""
        ...

    def settle(self, sequence: Sequence, used: bool) -> None:
        """The lease has been given back; with `used` False nothing was computed for it."""
        ...


def make_scheduler_policy(config: SchedulerConfig, count_cached: CountCached) -> Policy:
    """Build the policy that the configuration asks for; `count_cached` tells how many tokens of each prompt are."""
    max_overtakes = config.max_overtakes or _DEFAULT_MAX_OVERTAKES
    match config.policy:
        case SchedulerPolicy.FCFS:
            return FirstComeFirstServed()
        case SchedulerPolicy.PRIORITY:
            return HighestPriority()
        case SchedulerPolicy.DEADLINE:
            return EarliestDeadline()
        case SchedulerPolicy.SHORTEST_JOB:
            return ShortestJob(max_overtakes)
        case SchedulerPolicy.LONGEST_PREFIX:
            return LongestPrefix(max_overtakes, count_cached)
        case SchedulerPolicy.FAIR_SHARE:
            workers = (
                config.num_workers
                if config.mode is not SchedulerMode.STRICT
                else min(config.prefill_workers, config.decode_workers)
            )
            return FairShare(config.max_batch_size, workers, config.tenant_weights)


def check_heeded(request: Request, policy: SchedulerPolicy) -> None:
    """Refuse a request that asks for what its pipeline's policy would ignore.

    Raises:
        RequestError: `priority` or `deadline_ms` is set and the policy is not the one that heeds it.
    """
    if request.priority and policy is not SchedulerPolicy.PRIORITY:
        raise RequestError(f"found priority {request.priority}: leave it out, or set scheduler.policy: priority")
    if request.deadline_ms is not None and policy is not SchedulerPolicy.DEADLINE:
        raise RequestError(f"found deadline_ms {request.deadline_ms}: leave it out, or set scheduler.policy: deadline")


class FirstComeFirstServed:
    """In order of arrival."""

    max_slots = inf

    def __init__(self) -> None:
        self._waiting: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def in_order(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def remove(self, sequences: list[Sequence]) -> None:
        waiting = self._waiting
        for count, sequence in enumerate(sequences):
            if waiting[0] is not sequence:
                gone = set(map(id, sequences[count:]))
                self._waiting = deque(other for other in waiting if id(other) not in gone)
                return
            waiting.popleft()

    def rank(self, sequence: Sequence) -> float:
        return 0.0

    def may_claim(self, sequence: Sequence) -> bool:
        return False

    def charge(self, sequence: Sequence) -> None:
        pass

    def settle(self, sequence: Sequence, used: bool) -> None:
        pass


class HighestPriority(FirstComeFirstServed):
    """The largest `priority` first, for as long as there is one: lower ones may starve. Equals in order of arrival."""

    def add(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=self.rank)

    def rank(self, sequence: Sequence) -> float:
        return -sequence.request.priority


class EarliestDeadline(HighestPriority):
    """The earliest deadline first, arrival plus `deadline_ms`; those without one come last, in order of arrival.

    A deadline that has passed ends nothing: that is what the scheduler's timeouts are for.
    """

    def rank(self, sequence: Sequence) -> float:
        request = sequence.request
        return float("inf") if request.deadline_ms is None else request.arrival + request.deadline_ms / 1000


class ShortestJob(FirstComeFirstServed):
    """The smallest `max_new_tokens` first, of equals the one that came first.

    None is overtaken by more than `max_overtakes` that arrived later: only so many arrivals are looked at, from the
    oldest that waits on, whether they still wait or not. Rows are preempted newest first, which keeps that promise.
    """

    def __init__(self, max_overtakes: int) -> None:
        super().__init__()
        self._max_overtakes = max_overtakes
        self._arrivals = 0
        self._numbers: dict[int, int] = {}  # of arrival, by id of the sequence

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        self._numbers[id(sequence)] = self._arrivals
        self._arrivals += 1

    def remove(self, sequences: list[Sequence]) -> None:
        super().remove(sequences)
        for sequence in sequences:
            del self._numbers[id(sequence)]

    def in_order(self) -> Iterator[Sequence]:
        if not self._waiting:
            return iter(())
        last = self._numbers[id(self._waiting[0])] + self._max_overtakes
        return iter(self._sorted([*takewhile(lambda s: self._numbers[id(s)] <= last, self._waiting)]))

    def _sorted(self, sequences: list[Sequence]) -> list[Sequence]:
        return sorted(sequences, key=lambda sequence: sequence.sampling.max_new_tokens)


class LongestPrefix(ShortestJob):
    """The longest cached prefix first, so that it is used before it is evicted; `max_overtakes` as in ShortestJob.

    Without the bound this is SGLang's policy (Zheng et al., "SGLang: Efficient Execution of Structured Language Model
    Programs", 2024). What is cached is asked anew whenever somebody may get a lease.
    """

    def __init__(self, max_overtakes: int, count_cached: CountCached) -> None:
        super().__init__(max_overtakes)
        self._count_cached = count_cached

    def _sorted(self, sequences: list[Sequence]) -> list[Sequence]:
        reusing = [sequence for sequence in sequences if may_reuse(sequence)]
        prompts = [(sequence.prompt_tokens, namespace_of(sequence)) for sequence in reusing]
        counts = self._count_cached(prompts)
        cached = {id(sequence): count for sequence, count in zip(reusing, counts, strict=True)}
        return sorted(sequences, key=lambda sequence: -cached.get(id(sequence), 0))


@dataclass(slots=True)
class _Account:
    """What a tenant has had, in prompt tokens; an output token counts as `_OUTPUT_PRICE` of them."""

    served: float  # divided by the tenant's weight
    promised: int = 0  # for the leases that are out: the prompt and all the output that there may be
    slots: int = 0  # of those leases
    granted: int = 0  # promised for all leases so far
    settled: int = 0  # of that for those that came back
    remembered: bool = False  # listed to be forgotten once the level has come up to it


class FairShare:
    """The tenant that has the least, by tokens served and promised and divided by its weight, is next.

    Tenants without a weight have 1. A lease promises its prompt and `max_new_tokens`; when it comes back, what was
    computed has been served. A tenant that comes, or comes back after a while, starts at the level where the others
    are: idling earns no credit. What is served raises the level by an equal share for each tenant that waits or runs,
    so that who waits on is not passed by new tenants for ever. When KV blocks run out the tenant that has most gives
    way.

    A tenant that holds less than its share of all slots gets one even if others hold them all: `workers` with
    `max_batch_size` each are shared, and there are twice as many. So a flood makes nobody wait until it is done with a
    slot; those who hold more wait until the sum is below the bound again. Where KV blocks are what it lacks, it claims
    them: rows that rank behind it are preempted.

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
        self._before: dict[int, int] = {}  # `granted` at the grant, by id of the sequence
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
            if sequence is None or (count > free and slots[tenant] + count > self._share(tenant)):
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

    def rank(self, sequence: Sequence) -> float:
        """What the tenant has been served, and promised for the leases before this one; for all where it still waits.

        So of two tenants the one that runs more rows has those it was granted last preempted first.
        """
        tenant = sequence.request.tenant
        account = self._accounts[tenant]
        ahead = max(0, self._before.get(id(sequence), account.granted) - account.settled)
        return account.served + ahead / self._weight(tenant)

    def may_claim(self, sequence: Sequence) -> bool:
        tenant = sequence.request.tenant
        return self._accounts[tenant].slots + sequence.sampling.n <= self._share(tenant)

    def charge(self, sequence: Sequence) -> None:
        with self._lock:
            account = self._accounts[sequence.request.tenant]
            self._raise_level(account.served)
            account.promised += _promise(sequence)
            account.slots += sequence.sampling.n
            self._slots += sequence.sampling.n
            self._before[id(sequence)] = account.granted
            account.granted += _promise(sequence)

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
            self._before.pop(id(sequence), None)
            account.settled += _promise(sequence)
            account.promised -= _promise(sequence)  # last: until then nobody forgets the account
            self._leave_if_done(tenant)

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

    def _share(self, tenant: str) -> float:
        """Of the slots, among the tenants that are here."""
        weight = self._weight(tenant)
        return self._shared_slots * weight / max(self._present_weight, weight)

    def _had(self, tenant: str) -> float:
        account = self._accounts[tenant]
        return account.served + account.promised / self._weight(tenant)

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)


def _promise(sequence: Sequence) -> int:
    sampling = sequence.sampling
    return len(sequence.prompt_tokens) + _OUTPUT_PRICE * sampling.max_new_tokens * sampling.n
