"""What the operators of one pipeline share: tokenizer, KV cache, leases, worker. Built when first asked for."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import anyio

from ..backends.host import memory_bytes
from ..config import BackendType
from ..errors import ConfigError, EngineClosedError
from ..kv_runtime.cache import KVCache
from ..kv_runtime.eviction import make_eviction_policy
from .calls import CallDesk
from .flow.groups import lone_error_unwrapped
from .memory import check_kv_pool, check_slots
from .scheduler.lease import LeaseBook
from .scheduler.policies import make_scheduler_policy
from .scheduler.timeouts import Timeouts
from .scheduler.waiting import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from ..backends.base import Backend
    from ..config import BackendConfig, SageLLMConfig
    from ..graph.pipeline import Pipeline
    from ..models.resolve import ResolvedModel
    from ..models.tokenizer import TextTokenizer
    from ..records import Request, Sequence
    from .worker.executor import Executor
    from .worker.stop_strings import StopStringMatcher
    from .worker.worker import Worker


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
    def kv(self) -> KVCache:
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
    def leases(self) -> LeaseBook:
        scheduler = self.config.scheduler
        policy = make_scheduler_policy(scheduler, self.kv)
        return LeaseBook(self.kv, scheduler.max_batch_size, self.config.kv_cache.block_size, policy)

    @cached_property
    def calls(self) -> CallDesk:
        """Where a program's own requests come in, for `call_source` and `call_sink`."""
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
        return "null" if self.is_null else self.backend.name

    @cached_property
    def executor(self) -> Executor:
        slots, kv = self.config.scheduler.max_batch_size, self.config.kv_cache
        check_slots(slots, self.model.architecture.max_seq_len, kv.block_size)
        if self.is_null:
            from .worker.executor import NullExecutor

            _refuse_device(self.config.backend)
            check_kv_pool(kv, 0, memory_bytes()[0])
            return NullExecutor(slots)
        from ..models.weights import load_model
        from .worker.torch_executor import TorchExecutor

        model = load_model(self.model, self.backend)
        block_bytes = prod(model.kv_shape(1, kv.block_size)) * model.kv_dtype.itemsize
        check_kv_pool(kv, block_bytes, self.backend.memory_bytes()[0])
        return TorchExecutor(model, self.backend, self.kv.num_blocks, kv.block_size, slots)

    @cached_property
    def worker(self) -> Worker:
        from .worker.worker import Worker

        scheduler = self.config.scheduler
        step_tokens = scheduler.max_step_tokens or self._default_step_tokens()
        return Worker(
            self.executor,
            self.kv,
            self.leases,
            scheduler,
            self.model.architecture.max_seq_len,
            step_tokens,
            self._make_stop_matcher,
            self.clock,
        )

    def _default_step_tokens(self) -> int:
        """4096 on a GPU; on a CPU as many as keep a step near a fifth of a second, within 512 and 4096."""
        if self.backend_name != "cpu":
            return 4096
        return max(512, min(4096, 10**10 // self.model.architecture.num_parameters))

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

        return StopStringMatcher(self.tokenizer.stream(), sequence.sampling.stop, sequence.sampling.min_tokens)

    @asynccontextmanager
    async def running(self, needed: bool = True) -> AsyncIterator[None]:
        """Run the step loop for as long as the context lasts; leaving ends what is resident with an error.

        Once only. Where the pipeline has no stage that runs the model (`needed` False), nothing is loaded.
        """
        if not needed:
            yield
            return
        from .worker.driver import TaskDriver, ThreadDriver

        driver = TaskDriver(self.worker) if self.is_null else ThreadDriver(self.worker)
        with lone_error_unwrapped():
            async with anyio.create_task_group() as tasks:
                driver.start(tasks)
                try:
                    yield
                finally:
                    driver.stop()
                    self.executor.close()

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
        reclaimed = [request for request in requests if self.leases.reclaim(request)]
        if reclaimed and "worker" in self.__dict__:
            self.worker.on_leases_returned()
        if "worker" in self.__dict__:
            self.worker.reclaim(requests)

    def get_stats(self) -> dict[str, Any]:
        """Counters of what has been built so far."""
        stats: dict[str, Any] = {}
        if "kv" in self.__dict__:
            kv = self.kv
            cache = kv.stats()
            stats["kv_pool"] = {
                "num_blocks": kv.num_blocks,
                "block_size": self.config.kv_cache.block_size,
                "free_blocks": kv.num_free,
                "available_blocks": kv.available(),
                "usage": kv.usage(),
            }
            stats["kv_cache"] = {
                "cache_queries": cache.queries,
                "cache_hits": cache.hits,
                "queried_tokens": cache.queried_tokens,
                "hit_tokens": cache.hit_tokens,
                "hit_rate": cache.hit_tokens / cache.queried_tokens if cache.queried_tokens else 0.0,
                "evicted_blocks": cache.evicted_blocks,
                "cached_blocks": cache.cached_blocks,
            }
        if "worker" in self.__dict__:
            stats["worker"] = {
                "steps": self.worker.steps,
                "running": self.worker.num_running,
                "preemptions": self.worker.preemptions,
            }
        return stats


def _refuse_device(backend: BackendConfig) -> None:
    asks = backend.device_ids != [0] or backend.threads or backend.cpu_kernels != "auto"
    if backend.backend_type is BackendType.CUDA or asks:
        raise ConfigError(
            "backend: builtin:null runs on no device: leave backend_type, device_ids, threads and cpu_kernels out"
        )
