"""A simulation: a stream of requests through a cluster, to the end of the last one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...errors import FlowError
from ...records import FinishReason
from .cluster import Cluster, Routing
from .engine import SimulatedEngine
from .virtual_time import VirtualTime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from ...config import SageLLMConfig
    from ...records import Sequence
    from .engine import Stages, Target

_COMPUTED = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request; times in seconds of the simulation, None where it did not get that far."""

    request_id: str
    reason: FinishReason | None
    arrival: float
    scheduled: float | None
    first_token: float | None
    last_token: float | None
    finished: float
    prompt_tokens: int
    hit_tokens: int
    output_tokens: int

    @property
    def is_computed(self) -> bool:
        """Whether it ran to its end."""
        return self.reason in _COMPUTED

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def tpot_s(self) -> float | None:
        """The mean over output tokens after the first; None with fewer than two."""
        if self.first_token is None or self.last_token is None or self.output_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """`elapsed_s` is from the first arrival to the last end; `busy_s` is the time that each device computed."""

    outcomes: list[Outcome]
    latencies_s: NDArray[np.float64]  # between two tokens of a row, all of them
    elapsed_s: float
    busy_s: list[float]
    steps: int
    preemptions: int
    queried_tokens: int
    hit_tokens: int
    ddr_hit_tokens: int  # brought up from there, and then hit
    nvme_hit_tokens: int


def simulate(
    arrivals: Iterable[tuple[float, Sequence]],
    config: SageLLMConfig,
    stages: Stages,
    target: Target,
    output_token: Callable[[Sequence], int],
    replicas: int = 1,
    routing: Routing = Routing.LEAST_LOADED,
    *,
    repeats: bool = True,
) -> SimulationResult:
    """Let sequences arrive, each at its second, in ascending order, and run until all have ended.

    The same input gives the same result, also with `repeats` False, which takes steps that are all alike one by one.

    Raises:
        KVCacheError: one sequence alone fills the KV pool.
        FlowError: a sequence never ended, which is a bug.
    """
    time = VirtualTime()
    outcomes: list[Outcome] = []
    cluster = Cluster(
        replicas,
        routing,
        lambda on_end: SimulatedEngine(config, stages, target, time, output_token, on_end, repeats=repeats),
        lambda sequence: outcomes.append(_outcome(sequence)),
    )
    feed = _Feed(iter(arrivals), time, cluster)
    feed.schedule_next()
    try:
        time.run()
    finally:
        for engine in cluster.engines:
            engine.close()
    if len(outcomes) < feed.arrived:
        raise FlowError(f"{feed.arrived - len(outcomes)} of {feed.arrived} simulated requests never ended")
    engines = cluster.engines
    executors = [executor for engine in engines for executor in engine.executors]
    stats = [cache.stats() for engine in engines for cache in engine.prefix_caches]
    below = [told for engine in engines if (told := engine.services.tier_stats()) is not None]
    begin = min((outcome.arrival for outcome in outcomes), default=0.0)
    return SimulationResult(
        outcomes,
        np.concatenate([executor.latencies.values for executor in executors]),
        max((outcome.finished for outcome in outcomes), default=0.0) - begin,
        [executor.busy_s for executor in executors],
        sum(engine.worker.steps for engine in engines),
        sum(engine.worker.preemptions for engine in engines),
        sum(each.queried_tokens for each in stats),
        sum(each.hit_tokens for each in stats),
        sum(each.ddr_hit_tokens for each in below),
        sum(each.nvme_hit_tokens for each in below),
    )


class _Feed:
    """Brings the next arrival when its time has come; only one is made ahead."""

    def __init__(self, arrivals: Iterable[tuple[float, Sequence]], time: VirtualTime, cluster: Cluster) -> None:
        self._arrivals = iter(arrivals)
        self._time = time
        self._cluster = cluster
        self.arrived = 0

    def schedule_next(self) -> None:
        following = next(self._arrivals, None)
        if following is not None:
            self._time.call_at(following[0], lambda: self._bring(following[1]))

    def _bring(self, sequence: Sequence) -> None:
        self.arrived += 1
        sequence.request.arrival = self._time.now
        self._cluster.arrive(sequence)
        self.schedule_next()


def _outcome(sequence: Sequence) -> Outcome:
    timings = sequence.timings
    assert timings.finished is not None
    return Outcome(
        sequence.request_id,
        sequence.choices[0].finish_reason,
        sequence.request.arrival,
        timings.scheduled,
        timings.first_token,
        timings.last_token,
        timings.finished,
        len(sequence.prompt_tokens),
        sequence.prefix_hit_tokens,
        sum(len(choice.output_tokens) for choice in sequence.choices),
    )
