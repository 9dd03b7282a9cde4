"""Policies: whose turn it is to get a lease, and who gives way when KV blocks run out. No torch."""

from __future__ import annotations

from bisect import insort
from collections import deque
from itertools import takewhile
from math import inf
from typing import TYPE_CHECKING, Protocol

from ...config import SchedulerMode, SchedulerPolicy
from ...errors import RequestError
from .lease import may_reuse, namespace_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...config import SchedulerConfig
    from ...kv_runtime.pool import Int32Array
    from ...records import Request, Sequence
    from .lease import Namespace, Rank

    CountCached = Callable[[list[tuple[Int32Array, Namespace]]], list[int]]

_DEFAULT_MAX_OVERTAKES = 64


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

    def rank(self, sequence: Sequence) -> Rank:
        """Of sequences that run the smallest rank is computed first and the largest preempted; equals as admitted."""
        ...

    def claimants(self) -> Iterator[Sequence]:
        """Those that wait and, if all they lack is KV blocks, may have rows preempted whose rank is larger in its first
        place; the first to do so first."""
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
            from .fair_share import FairShare

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

    def rank(self, sequence: Sequence) -> Rank:
        return (0.0,)

    def claimants(self) -> Iterator[Sequence]:
        return iter(())

    def charge(self, sequence: Sequence) -> None:
        pass

    def settle(self, sequence: Sequence, used: bool) -> None:
        pass


class HighestPriority(FirstComeFirstServed):
    """The largest `priority` first, for as long as there is one: lower ones may starve. Equals in order of arrival."""

    def add(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=self.rank)

    def rank(self, sequence: Sequence) -> Rank:
        return (-sequence.request.priority,)


class EarliestDeadline(HighestPriority):
    """The earliest deadline first, arrival plus `deadline_ms`; those without one come last, in order of arrival.

    A deadline that has passed ends nothing: that is what the scheduler's timeouts are for.
    """

    def rank(self, sequence: Sequence) -> Rank:
        request = sequence.request
        return (inf if request.deadline_ms is None else request.arrival + request.deadline_ms / 1000,)


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
