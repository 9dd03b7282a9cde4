"""`sagellm simulate`: a trace through the scheduler in virtual time, once for each combination that is compared."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from ..config import KVEviction, SageLLMConfig, SchedulerMode, SchedulerPolicy
from ..config.problems import to_config_error
from ..errors import ConfigError
from ..runtime.simulation.simulation import simulate
from .measurement import format_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..runtime.simulation.cluster import Routing
    from ..runtime.simulation.engine import Stages, Target
    from ..runtime.simulation.simulation import SimulationResult
    from .traces import TraceReplay

_HEADER = ["mode", "policy", "eviction", "workers", "rate", "requests", "computed"]
_HEADER += ["TTFT p50", "p99", "TPOT p50", "p99", "ITL p99", "preempted", "busy", "simulated s", "wall s"]
_HITS_AT = _HEADER.index("preempted")


@dataclass(frozen=True, slots=True)
class Scenario:
    """One combination. `workers` are replicas of the engine or, in mode `strict`, "2+1": prefill and decode workers."""

    mode: SchedulerMode
    policy: SchedulerPolicy
    eviction: KVEviction
    workers: str
    rate_scale: float

    @property
    def replicas(self) -> int:
        return 1 if self.mode is SchedulerMode.STRICT else int(self.workers)

    def configure(self, config: SageLLMConfig) -> SageLLMConfig:
        """The configuration, changed to this; what only another mode or policy heeds is left out.

        Raises:
            ConfigError, NotAvailableError: there is no such engine.
        """
        values = config.model_dump(mode="json", exclude_unset=True)
        scheduler: dict[str, Any] = values.setdefault("scheduler", {})
        if self.mode is not config.scheduler.mode:
            for key in ("prefill_steps", "decode_steps", "prefill_workers", "decode_workers", "transfer_timeout_s"):
                scheduler.pop(key, None)
        if self.policy is not config.scheduler.policy:
            for key in ("tenant_weights", "max_overtakes"):
                scheduler.pop(key, None)
        scheduler |= {"mode": self.mode.value, "policy": self.policy.value}
        if self.mode is SchedulerMode.STRICT:
            prefill, decode = map(int, self.workers.split("+"))
            scheduler |= {"prefill_workers": prefill, "decode_workers": decode}
        values.setdefault("kv_cache", {})["eviction"] = self.eviction.value
        values.get("backend", {}).pop("device_ids", None)
        try:
            return SageLLMConfig.model_validate(values)
        except ValidationError as error:
            explained = to_config_error(SageLLMConfig, error, "engine")
            raise type(explained)(f"{self.mode}, {self.policy}: {explained}") from None


def scenarios(
    config: SageLLMConfig,
    modes: tuple[str, ...],
    policies: tuple[str, ...],
    evictions: tuple[str, ...],
    workers: tuple[str, ...],
    rate_scales: tuple[float, ...],
) -> Iterator[Scenario]:
    """Every combination; what is not given is as the configuration says. `workers` like "1+1" are for mode `strict`.

    Raises:
        ConfigError: numbers of workers are given, but none for one of the modes.
    """
    scheduler = config.scheduler
    for mode in map(SchedulerMode, modes or (scheduler.mode,)):
        strict = mode is SchedulerMode.STRICT
        own = [given for given in workers if ("+" in given) is strict]
        if workers and not own:
            raise ConfigError(f"--workers {workers[0]} is not for mode {mode}: add {'1+1' if strict else '2'}")
        default = f"{scheduler.prefill_workers}+{scheduler.decode_workers}" if strict else "1"
        for policy, eviction, count, rate in product(
            policies or (scheduler.policy,), evictions or (config.kv_cache.eviction,), own or (default,), rate_scales
        ):
            yield Scenario(mode, SchedulerPolicy(policy), KVEviction(eviction), count, rate)


@dataclass(frozen=True, slots=True)
class Objective:
    """A request is good if it was computed to its end with both kept: milliseconds to the first token, and on average
    for each token after it."""

    ttft_ms: float
    tpot_ms: float

    def __str__(self) -> str:
        return f"{self.ttft_ms:g}/{self.tpot_ms:g}"

    def goodput(self, result: SimulationResult) -> float:
        """The share of all requests that are good."""
        good = [
            outcome.is_computed
            and (outcome.ttft_s or 0.0) * 1000 <= self.ttft_ms
            and (outcome.tpot_s or 0.0) * 1000 <= self.tpot_ms
            for outcome in result.outcomes
        ]
        return sum(good) / len(good)


def run_scenario(
    scenario: Scenario,
    config: SageLLMConfig,
    stages: Stages,
    target: Target,
    trace: TraceReplay,
    routing: Routing,
    objectives: list[Objective],
) -> list[str]:
    """Simulate one combination and return its row of the table; times in milliseconds, and only the last one is real.

    Raises:
        ConfigError: there is no such engine.
        KVCacheError: one sequence alone fills the KV pool.
    """
    start = time.perf_counter()
    result = simulate(
        trace.arrivals(scenario.rate_scale),
        scenario.configure(config),
        stages,
        target,
        trace.output_token,
        scenario.replicas,
        routing,
    )
    seconds = time.perf_counter() - start
    outcomes = result.outcomes
    row = [scenario.mode, scenario.policy, scenario.eviction, scenario.workers, f"{scenario.rate_scale:g}"]
    row += [f"{len(outcomes)}", f"{sum(outcome.is_computed for outcome in outcomes)}"]
    row += _percentiles([each.ttft_s for each in outcomes]) + _percentiles([each.tpot_s for each in outcomes])
    row += _percentiles(result.latencies_s)[1:]
    row += [f"{objective.goodput(result):.3f}" for objective in objectives]
    hits = [result.hit_tokens]
    if config.kv_cache.enable_tiering:
        hits += [result.ddr_hit_tokens, result.nvme_hit_tokens]
    row += [f"{tokens / max(result.queried_tokens, 1):.1%}" for tokens in hits]
    row += [f"{result.preemptions}"]
    row += ["/".join(f"{busy / (result.elapsed_s or 1.0):.0%}" for busy in result.busy_s)]
    return [*row, f"{result.elapsed_s:.1f}", f"{seconds:.1f}"]


def _percentiles(seconds: Any) -> list[str]:
    """The median and the 99th percentile in milliseconds."""
    known = np.array([each for each in seconds if each is not None]) if isinstance(seconds, list) else seconds
    if not len(known):
        return ["-", "-"]
    return [f"{value * 1000:.1f}" for value in np.percentile(known, [50, 99])]


def format_rows(rows: list[list[str]], objectives: list[Objective], *, tiered: bool) -> str:
    """The table; `tiered` with the shares of the queried tokens that came up from lower tiers."""
    goodputs = [f"goodput {objective}" for objective in objectives]
    hits = ["hit rate", "of DDR", "of NVME"] if tiered else ["hit rate"]
    return format_table([*_HEADER[:_HITS_AT], *goodputs, *hits, *_HEADER[_HITS_AT:]], rows)
