"""What the operators of one pipeline share: tokenizer, KV cache, leases, worker. Built when first asked for."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

import anyio

from ..config import InferenceMode, Isolation, SchedulerMode
from ..errors import ConfigError, EngineClosedError
from ..kv_runtime.cache import KVCache
from ..kv_runtime.eviction import make_eviction_policy
from .calls import CallDesk
from .executors import make_executors
from .flow.groups import lone_error_unwrapped
from .scheduler.lease import LeaseBook
from .scheduler.pin_book import PinBook
from .scheduler.policies import make_scheduler_policy
from .scheduler.swap import Swap
from .scheduler.timeouts import Timeouts
from .scheduler.waiting import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from ..accel.step_cost import StepCost
    from ..backends.base import Backend
    from ..config import SageLLMConfig
    from ..graph.pipeline import Pipeline
    from ..kv_runtime.block_times import BlockTimes
    from ..kv_runtime.tiers import FetchCost, KVTiers, TierStats
    from ..models.guide_compiler import GuideCompiler
    from ..models.resolve import ResolvedModel
    from ..models.tokenizer import TextTokenizer
    from ..records import Request, Sequence
    from .scheduler.handover import PairedLeases
    from .worker.disaggregated import DisaggregatedWorkers
    from .worker.executor import Executor, PooledExecutor
    from .worker.process.remote_executor import RemoteExecutor
    from .worker.stop_strings import StopStringMatcher
    from .worker.worker import Worker

AnyWorker = TypeVar("AnyWorker", bound="Worker")


class EngineServices:
    """One model on one device. Nothing heavy is imported or loaded before an operator needs it.

    Attributes are built on first use; `model` may raise ModelNotFoundError or CheckpointError, `worker` also
    ConfigError where the device or the KV pool cannot be had. `clock` gives all of them monotonic seconds.
    """

    def __init__(self, config: SageLLMConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.clock = clock
        self.lets_go = False  # see `let_go`

    @cached_property
    def model(self) -> ResolvedModel:
        from ..models.resolve import resolve_model

        return resolve_model(self.config.model)

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        from ..models.tokenizer import load_tokenizer

        return load_tokenizer(self.model)

    @cached_property
    def guides(self) -> GuideCompiler:
        from ..models.guide_compiler import GuideCompiler

        return GuideCompiler(self.model, lambda: self.tokenizer)

    @cached_property
    def kv_caches(self) -> list[KVCache]:
        """The books of each worker's pool; in mode strict those of the workers for prefill come first."""
        return [self._make_kv_cache() for _ in range(self.config.scheduler.num_workers)]

    @property
    def kv(self) -> KVCache:
        """The books of the only pool, or of the first worker's."""
        return self.kv_caches[0]

    def _make_kv_cache(self) -> KVCache:
        kv = self.config.kv_cache
        return KVCache(
            kv.max_tokens // kv.block_size,
            kv.block_size,
            kv.enable_prefix_caching,
            kv.enable_cross_request_sharing,
            make_eviction_policy(kv.eviction),
            kv.ttl_s,
            self.clock,
        )

    @cached_property
    def leases(self) -> LeaseBook | PairedLeases:
        scheduler = self.config.scheduler
        slots, size = scheduler.num_slots, self.config.kv_cache.block_size
        policy = make_scheduler_policy(scheduler, lambda prompts: self.leases.count_cached(prompts, touch=False))
        if scheduler.mode is not SchedulerMode.STRICT:
            return LeaseBook(self.kv, slots, size, policy)
        from .scheduler.handover import PairedLeases

        return PairedLeases.over(self.kv_caches, scheduler.prefill_workers, slots, size, policy)

    @cached_property
    def pins(self) -> PinBook:
        return PinBook(self.kv_caches, int(self.kv.num_blocks * self.config.kv_cache.max_pinned_ratio))

    @cached_property
    def calls(self) -> CallDesk:
        """Where a program's own requests come in, for `call_source`."""
        return CallDesk()

    @cached_property
    def waiting(self) -> WaitingQueue:
        return WaitingQueue(self.leases, Timeouts.of(self.config.scheduler), self.clock)

    @property
    def is_null(self) -> bool:
        """Whether the model is the null model: no device, no torch."""
        return self.model.weights == "null"

    @cached_property
    def backend(self) -> Backend:
        from ..backends import detect_backend

        return detect_backend(self.config.backend)

    @cached_property
    def backend_name(self) -> str:
        if self.is_null:
            return "null"
        return self._processes[0].backend_name if self.has_processes else self.backend.name

    @property
    def has_processes(self) -> bool:
        """Whether each worker's model runs in a process of its own."""
        return self.config.scheduler.isolation is Isolation.PROCESS

    @cached_property
    def _processes(self) -> list[RemoteExecutor]:
        from .executors import start_processes

        return start_processes(self.config, self.model)

    @cached_property
    def executors(self) -> list[Executor]:
        """One for each worker."""
        if self.has_processes:
            return [*self._processes]
        return make_executors(self.config, self.model, None if self.is_null else self.backend, self.guides)

    @cached_property
    def tiers(self) -> list[KVTiers]:
        """The tiers below the pools, if there are any: those of workers that compute prompts, then those of the others,
        if they swap."""
        if not self.config.kv_cache.enable_tiering:
            return []
        always = self.is_null or self.config.inference_mode is not InferenceMode.STANDARD
        cost = None if always else self.step_cost
        leases = self.leases
        books = [leases] if isinstance(leases, LeaseBook) else [*leases.prefill]
        if self.config.scheduler.preemption == "swap" and not isinstance(leases, LeaseBook):
            books += leases.decode
        executors = cast("list[PooledExecutor]", self.executors)
        pools = [(book.kv, executor) for book, executor in zip(books, executors, strict=False)]
        tiers = self.build_tiers(pools, cost)
        for book, below in zip(books, tiers, strict=True):
            book.tiers = below
            below.fetcher.on_fetched.append(self._on_fetched)
        return tiers

    def build_tiers(self, pools: list[tuple[KVCache, PooledExecutor]], cost: FetchCost | None) -> list[KVTiers]:
        """Those below each pool, with the executor that holds it.

        Raises:
            ConfigError: they do not fit into main memory.
        """
        from .tiers import build_tiers

        return build_tiers(self.config.kv_cache, self.model, pools, cost, self.clock)

    async def run_io(self, job: Callable[[], Any]) -> Any:
        """Run what waits for a disk on a thread; for the null model, whose KV has no bytes, here and now."""
        return job() if self.is_null else await anyio.to_thread.run_sync(job)

    def _on_fetched(self) -> None:
        """Somebody may wait for it: a sequence for its lease, or a preempted row."""
        self.worker.on_leases_returned()
        for worker in self.worker.workers:
            worker.wake()

    @cached_property
    def worker(self) -> Worker | DisaggregatedWorkers:
        from .worker.disaggregated import DecodeWorker, DisaggregatedWorkers, PrefillWorker
        from .worker.worker import Worker

        if self.config.scheduler.tpot_slo_ms is not None:
            self.step_cost  # noqa: B018 - what is not known is measured while nothing else uses the device
        executors, leases = self.executors, self.leases  # executors first: they refuse what does not fit
        self.tiers  # noqa: B018 - built on first use
        if isinstance(leases, LeaseBook):
            return self._make_worker(Worker, executors[0], leases)
        count = len(leases.prefill)
        prefill = [self._make_worker(PrefillWorker, *pair) for pair in zip(executors, leases.prefill, strict=False)]
        for worker in prefill:
            worker.fails_with_transfer = self.config.scheduler.on_transfer_failure == "fail"
        decode = [self._make_worker(DecodeWorker, *pair) for pair in zip(executors[count:], leases.decode, strict=True)]
        for executor in executors[:count]:
            executor.connect([peer.pool for peer in executors[count:]])
        return DisaggregatedWorkers(prefill, decode)

    def _make_worker(self, kind: type[AnyWorker], executor: Executor, leases: LeaseBook) -> AnyWorker:
        scheduler = self.config.scheduler
        worker = kind(
            executor,
            leases.kv,
            leases,
            scheduler,
            self.model.architecture.max_seq_len,
            self.max_step_tokens,
            self._make_stop_matcher,
            self.clock,
            None if scheduler.tpot_slo_ms is None else self.step_cost,
        )
        if leases.tiers is not None and scheduler.preemption == "swap":
            worker.blocks.swap = Swap(leases.tiers)
        return worker

    @property
    def max_step_tokens(self) -> int:
        """As configured; else 4096 on a GPU, and on a CPU as many as keep a step near a fifth of a second, within 512
        and 4096."""
        if self.config.scheduler.max_step_tokens is not None:
            return self.config.scheduler.max_step_tokens
        if self.backend_name != "cpu":
            return 4096
        return max(512, min(4096, 10**10 // self.model.architecture.num_parameters))

    @cached_property
    def step_cost(self) -> StepCost:
        """Seconds of steps, prompts and transfers of this model on this device.

        The device's rates are measured once and kept; the first time ever takes up to a minute, and wants the device
        for itself: so before the worker is built.

        Raises:
            ConfigError: the model is the null model, whose steps take no time.
        """
        if self.is_null:
            raise ConfigError(
                "model: builtin:null computes nothing, so its steps have no cost to estimate: write another model, or "
                "leave scheduler.tpot_slo_ms out"
            )
        from ..accel.step_cost import StepCost
        from .worker.calibration import kv_element_bytes, load_rates

        rates = load_rates(self.model, self.backend, self.config.kv_cache.nvme_path)
        element_bytes = kv_element_bytes(self.model, self.backend)
        return StepCost(self.model.architecture, rates, element_bytes, self.max_step_tokens)

    def load(self) -> None:
        """Build everything a pipeline with a model needs, so that what is wrong shows before the flow starts.

        Raises:
            ModelError: the model cannot be found, read or built.
            ConfigError: the device or the KV pool cannot be had.
        """
        self.tokenizer  # noqa: B018 - built on first use
        self.worker  # noqa: B018

    @staticmethod
    def is_needed_by(pipeline: Pipeline) -> bool:
        """Whether a pipeline has a stage that runs the model."""
        return any("prefilled" in node.spec.provides | node.spec.requires for node in pipeline.nodes.values())

    def _make_stop_matcher(self, sequence: Sequence) -> StopStringMatcher:
        from .worker.stop_strings import StopStringMatcher

        tokenizer = self.tokenizer.for_tools if sequence.request.tools else self.tokenizer
        return StopStringMatcher(tokenizer.stream(), sequence.sampling.stop, sequence.sampling.min_tokens)

    @asynccontextmanager
    async def running(self, needed: bool = True) -> AsyncIterator[None]:
        """Run the step loop for as long as the context lasts; leaving ends what is resident with an error.

        Once only. Where the pipeline has no stage that runs the model (`needed` False), nothing is loaded.
        """
        if not needed:
            yield
            return
        from .worker.driver import TaskDriver, ThreadDriver

        kind = TaskDriver if self.is_null and not self.has_processes else ThreadDriver
        for process, worker in zip(self._processes if self.has_processes else (), self.worker.workers, strict=False):
            process.on_exit = worker.wake
        drivers = [kind(worker) for worker in self.worker.workers]
        with lone_error_unwrapped():
            async with anyio.create_task_group() as tasks:
                for driver in drivers:
                    driver.start(tasks)
                try:
                    yield
                finally:
                    for driver in drivers:
                        driver.stop()
                    for tiers in self.tiers:
                        tiers.close()
                    for executor in self.executors:
                        executor.close()

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a lease."""
        return len(self.waiting) if "waiting" in self.__dict__ else 0

    @property
    def num_running(self) -> int:
        """Sequences on the worker, each choice of a request for itself."""
        return self.worker.num_running if "worker" in self.__dict__ else 0

    def cancel(self, requests: list[Request]) -> None:
        """End requests wherever they are; from any thread."""
        for request in requests:
            request.cancelled = True
        if "worker" in self.__dict__:
            with suppress(EngineClosedError):  # a failed worker has ended them already
                self.worker.cancel(requests)
            self.worker.on_leases_returned()

    def let_go(self) -> None:
        """From now on lines of a file that have no lease are let go: the next run computes them, and nobody waits."""
        self.lets_go = True
        if "worker" in self.__dict__:
            self.worker.on_leases_returned()

    def release(self, requests: list[Request]) -> None:
        """Take back the leases of requests that ended outside the worker."""
        if "leases" not in self.__dict__:
            return
        self.pins.end(requests)
        reclaimed = [request for request in requests if self.leases.reclaim(request)]
        if reclaimed and "worker" in self.__dict__:
            self.worker.on_leases_returned()
        if "worker" in self.__dict__:
            self.worker.reclaim(requests)

    def tier_stats(self) -> TierStats | None:
        """What the tiers did, if there are any and they have been built."""
        if "tiers" not in self.__dict__ or not self.tiers:
            return None
        from ..kv_runtime.tiers import TierStats

        return TierStats.total([tiers.stats() for tiers in self.tiers])

    def block_times(self) -> BlockTimes | None:
        """How long cached KV blocks lived, rested and waited, on all workers; None before there are any."""
        from ..kv_runtime.block_times import BlockTimes

        if "kv_caches" not in self.__dict__:
            return None
        return BlockTimes.merged(kv.block_times() for kv in self.kv_caches)

    def get_stats(self) -> dict[str, Any]:
        """Counters of what has been built so far."""
        stats: dict[str, Any] = {}
        if "kv_caches" in self.__dict__:
            kvs = self.kv_caches
            caches = [kv.stats() for kv in kvs]
            stats["kv_pool"] = {
                "num_blocks": sum(kv.num_blocks for kv in kvs),
                "block_size": self.config.kv_cache.block_size,
                "free_blocks": sum(kv.num_free for kv in kvs),
                "available_blocks": sum(kv.available() for kv in kvs),
                "usage": sum(kv.usage() for kv in kvs) / len(kvs),
            }
            queried, hit = (sum(getattr(cache, name) for cache in caches) for name in ("queried_tokens", "hit_tokens"))
            stats["kv_cache"] = {
                "cache_queries": sum(cache.queries for cache in caches),
                "cache_hits": sum(cache.hits for cache in caches),
                "queried_tokens": queried,
                "hit_tokens": hit,
                "hit_rate": hit / queried if queried else 0.0,
                "evicted_blocks": sum(cache.evicted_blocks for cache in caches),
                "cached_blocks": sum(cache.cached_blocks for cache in caches),
                "pinned_blocks": sum(cache.pinned_blocks for cache in caches),
            }
        if tiers := self.tier_stats():
            stats["kv_tiers"] = asdict(tiers)
        if times := self.block_times():
            stats["kv_cache"] |= {
                f"block_{name}_s": {
                    "count": each.count,
                    "mean": each.mean,
                    "p50": each.quantile(0.5),
                    "p99": each.quantile(0.99),
                }
                for name, each in zip(times._fields, times, strict=True)
            }
        if "worker" in self.__dict__:
            stats["worker"] = {
                "steps": self.worker.steps,
                "running": self.worker.num_running,
                "preemptions": self.worker.preemptions,
            }
        return stats
