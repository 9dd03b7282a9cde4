"""One engine in virtual time: the stages that matter to the scheduler, and the worker's thread, as events.

What decides is the real run's: waiting queue, policy, leases, KV cache, planner, worker. What is played is the flow
that connects them: `HOP_S` passes wherever records go from one thread to another.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np

from ...config import InferenceMode, SchedulerMode
from ...errors import ConfigError, RequestError
from ...kv_runtime.pool import NO_BLOCKS
from ...records import FinishReason
from ..scheduler.lease import PrefixHint, namespace_of
from ..scheduler.timeouts import NEVER, Timeouts
from ..scheduler.waiting import end_unstarted
from ..services import EngineServices
from ..tiers import build_below, tier_blocks
from ..worker.disaggregated import PrefillWorker
from .executor import SimulatedExecutor
from .tiers import SimulatedBlockIO, SimulatedFiles
from .virtual_thread import VirtualThread
from .virtual_time import LAST
from .worker_thread import WorkerThread

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...accel.step_cost import StepCost
    from ...config import SageLLMConfig
    from ...graph.pipeline import Pipeline
    from ...kv_runtime.cache import KVCache
    from ...kv_runtime.tiers import FetchCost, KVTiers
    from ...models.resolve import ResolvedModel
    from ...records import Sequence
    from ..scheduler.waiting import WaitingQueue
    from ..worker.executor import PooledExecutor
    from .executor import StepTimes
    from .virtual_time import VirtualTime

HOP_S = 0.0005  # what a list of records takes through the flow to or from the worker, as measured on this engine


class WaitingBounds(Protocol):
    """The configuration of `schedule`."""

    def is_reached(self, waiting: WaitingQueue) -> bool:
        """Whether nobody else may begin to wait."""
        ...


class Target(NamedTuple):
    """A model on a device, whose name decides defaults as a backend's does: a "cpu" has smaller steps."""

    model: ResolvedModel
    device: str
    times: StepTimes


@dataclass(frozen=True, slots=True)
class Stages:
    """What a pipeline's stages ask of the engine. `bounds` None lets any number wait."""

    bounds: WaitingBounds | None = None
    looks_up: bool = True
    commits: bool = True
    commits_outputs: bool = True
    max_prefill_batch: int | None = None
    max_decode_batch: int | None = None

    @classmethod
    def of(cls, pipeline: Pipeline) -> Stages:
        """Those of a pipeline; other operators are taken to cost no time.

        Raises:
            ConfigError: it has no stage that schedules, computes prompts or decodes.
        """
        configs: dict[str, Any] = {node.spec.name: node.config for node in pipeline.nodes.values()}
        missing = [name for name in ("schedule", "prefill", "decode") if name not in configs]
        if missing:
            raise ConfigError(f"pipeline {pipeline.name!r} has no {missing[0]!r} stage: there is nothing to simulate")
        return cls(
            cast("WaitingBounds", configs["schedule"]),
            "kv_lookup" in configs,
            "kv_commit" in configs,
            "kv_commit" in configs and configs["kv_commit"].outputs,
            configs["prefill"].max_batch,
            configs["decode"].max_batch,
        )


class _SimulatedServices(EngineServices):
    """Those of an engine whose copies of KV take virtual time: each pool's on a thread of its own, and exports."""

    def __init__(
        self, config: SageLLMConfig, times: StepTimes, time: VirtualTime, before_turn: Callable[[], None]
    ) -> None:
        super().__init__(config, clock=time)
        self._times = times
        self._time = time
        self._before_turn = before_turn
        self._virtual_threads: list[VirtualThread] = []
        self.exporter = self._start_thread()

    def _start_thread(self) -> VirtualThread:
        self._virtual_threads.append(VirtualThread(self._time, self._before_turn))
        return self._virtual_threads[-1]

    def build_tiers(self, pools: list[tuple[KVCache, PooledExecutor]], cost: FetchCost | None) -> list[KVTiers]:
        kv, times = self.config.kv_cache, self._times
        host_blocks, in_files = tier_blocks(kv)
        files = None
        if kv.nvme_path is not None:
            has_all = self.config.inference_mode is InferenceMode.DECODE_ONLY
            block_bytes = times.kv_bytes_per_token * kv.block_size
            files = SimulatedFiles(in_files, block_bytes, times, self._time, has_all=has_all)
        tiers = []
        for cache, executor in pools:
            simulated = cast("SimulatedExecutor", executor)
            simulated.block_io = SimulatedBlockIO(simulated, times, kv.block_size, self._time, files)
            submit = self._start_thread().submit
            tiers.append(build_below(kv, cache, executor, host_blocks, files, cost, self._time, submit))
        return tiers

    def close(self) -> None:
        for thread in self._virtual_threads:
            thread.close()


class SimulatedEngine:
    """Takes sequences as they arrive; `on_end` gets each of them back, ended."""

    def __init__(
        self,
        config: SageLLMConfig,
        stages: Stages,
        target: Target,
        time: VirtualTime,
        output_token: Callable[[Sequence], int],
        on_end: Callable[[Sequence], None],
        *,
        repeats: bool = True,
    ) -> None:
        """With `repeats` False steps that are all alike are taken one by one all the same, which comes to the same.

        Raises:
            ConfigError: there is no such engine.
        """
        mode = config.inference_mode
        if mode is InferenceMode.DECODE_ONLY and config.scheduler.on_transfer_failure == "fail":
            raise ConfigError(
                "scheduler.on_transfer_failure fail: in a simulation of decode_only all KV is in files; write recompute"
            )
        slots, layers = config.scheduler.num_slots, target.model.architecture.num_layers
        self.executors = [
            SimulatedExecutor(slots, layers, target.times, time, output_token)
            for _ in range(config.scheduler.num_workers)
        ]
        self.services = services = _SimulatedServices(config, target.times, time, self.catch_up)
        services.model, services.backend_name = target.model, target.device
        services.executors = [*self.executors]
        services.step_cost = cast("StepCost", target.times)
        self._stages = stages
        self._time = time
        self._on_end = on_end
        self._timeouts = Timeouts.of(config.scheduler)
        self._outside: deque[Sequence] = deque()  # beyond what the stage `schedule` lets wait
        self._grants = False  # whether a grant is on its way
        self._looks_at = float("inf")  # whether the next fetch is late
        self.worker = worker = services.worker
        # Who computes prompts for others holds blocks of their pools; nobody else touches another worker.
        self._threads = [
            WorkerThread(
                each,
                executor,
                time,
                self.catch_up if isinstance(each, PrefillWorker) else lambda rank: None,
                repeats=repeats,
            )
            for each, executor in zip(worker.workers, self.executors, strict=True)
        ]
        for below in services.tiers:
            for thread in self._threads:
                below.fetcher.on_fetched.append(thread.wake)
        worker.on_prefilled = self._after_hop(self._commit)
        worker.on_decoded = self._after_hop(self._end)
        worker.on_leases_returned = self._grant_soon
        if stages.max_prefill_batch is not None:
            worker.limit_prefill(stages.max_prefill_batch)
        if stages.max_decode_batch is not None:
            worker.limit_decode(stages.max_decode_batch)

    def _after_hop(self, handler: Callable[[list[Any]], None]) -> Callable[[list[Any]], None]:
        return lambda records: self._time.call_later(HOP_S, partial(handler, records))

    def catch_up(self, rank: int = LAST) -> None:
        """Something of this rank is about to look at the engine or to change it: what comes before must have been."""
        for thread in self._threads:
            thread.catch_up(rank)

    def _before_worker(self, rank: int) -> None:
        """One worker is about to do something that others may feel."""
        if len(self._threads) > 1:
            self.catch_up(rank)

    def close(self) -> None:
        """End the threads that copied blocks."""
        self.services.close()

    # -- kv_lookup, schedule -----------------------------------------------------------------------------------------

    def arrive(self, sequence: Sequence) -> None:
        """A sequence has been tokenized. What can never fit ends at once, with `error`."""
        if self.services.config.inference_mode is InferenceMode.PREFILL_ONLY:
            fewest = min(sequence.sampling.min_tokens, 1)
            sequence.sampling = replace(sequence.sampling, max_new_tokens=1, min_tokens=fewest)
        try:
            if len(sequence.prompt_tokens) + sequence.sampling.max_new_tokens > self.services.model.max_seq_len:
                raise RequestError(f"longer than the model's max_seq_len {self.services.model.max_seq_len}")
            self.services.leases.check_fits(sequence)
        except RequestError as error:
            sequence.error = str(error)
            end_unstarted(sequence, FinishReason.ERROR, self._time.now)
            self._on_end(sequence)
            return
        self.catch_up()
        if self._stages.looks_up:
            (cached,) = self.services.leases.count_cached([(sequence.prompt_tokens, namespace_of(sequence))])
            sequence.kv = PrefixHint(cached)
            self._look_below(sequence)
        self._outside.append(sequence)
        self._let_wait()
        self._grant_soon()

    def _look_below(self, sequence: Sequence) -> None:
        tiers = self.services.tiers
        if not tiers:
            return
        self.services.leases.look_below(sequence)
        if self.services.config.inference_mode is InferenceMode.DECODE_ONLY:
            tiers[0].discover([sequence.kv.fetch])
        sequence.kv.fetcher.is_coming(sequence.kv.fetch)

    def _let_wait(self) -> None:
        waiting, bounds = self.services.waiting, self._stages.bounds
        while self._outside and not (bounds is not None and bounds.is_reached(waiting)):
            sequence = self._outside.popleft()
            waiting.offer(sequence)
            timeout = self._timeouts.end_of_waiting(sequence)
            if timeout != NEVER:
                self._time.call_at(timeout.at, partial(self._give_up, sequence))

    def _give_up(self, sequence: Sequence) -> None:
        if sequence.timings.scheduled is None and not sequence.ended:
            self._grant()

    def _grant_soon(self) -> None:
        if not self._grants:
            self._grants = True
            self._time.call_later(HOP_S, self._grant)

    def _grant(self) -> None:
        self._grants = False
        waiting = self.services.waiting
        if not len(waiting):
            return
        self.catch_up()
        ended, granted = waiting.take_ended(), waiting.take_granted()
        if self.services.leases.num_fetching:
            self._look_again_at(waiting.next_timeout())
        if granted:
            self.worker.submit_prefill(granted)
        for sequence in ended:
            self._on_end(sequence)
        if self._outside and (granted or ended):
            self._let_wait()
            self._grant_soon()

    def _look_again_at(self, moment: float) -> None:
        """Who waits for KV from below does so until then at most."""
        if moment < self._looks_at:
            self._looks_at = moment
            self._time.call_at(moment, self._look_again)

    def _look_again(self) -> None:
        self._looks_at = float("inf")
        self._grant()

    # -- kv_commit, after decode -------------------------------------------------------------------------------------

    def _commit(self, sequences: list[Sequence]) -> None:
        """What the stages after `prefill` do with what has come out of it."""
        self.catch_up()
        going = []
        for sequence in sequences:
            if sequence.ended:
                self._on_end(sequence)
            else:
                going.append(sequence)
        if self._stages.commits:
            for sequence in going:
                sequence.kv.commit_outputs = self._stages.commits_outputs
            self.services.leases.commit(going)
            self._grant_soon()
            tiers = self.services.tiers
            if self.services.config.inference_mode is InferenceMode.PREFILL_ONLY and tiers and tiers[0].has_files:
                self._export(tiers[0], going)
                return
        if going:
            self.worker.submit_decode(going)

    def _export(self, tiers: KVTiers, sequences: list[Sequence]) -> None:
        """Let prompts go on when their KV is in files."""
        runs = [(each.prompt_tokens, each.kv.blocks, namespace_of(each)) for each in sequences]
        held = np.concatenate([NO_BLOCKS, *(blocks for _, blocks, _ in runs)])
        self.services.kv.retain(held)

        def export() -> None:
            for run in runs:
                tiers.export(*run)
            self.services.kv.release(held)
            if sequences:
                self.worker.submit_decode(sequences)
            self._grant_soon()

        self.services.exporter.submit(export)

    def _end(self, records: list[Any]) -> None:
        for sequence in records:
            self._on_end(sequence)

    @property
    def prefix_caches(self) -> list[KVCache]:
        """Those in which prompts are looked up: of the workers that compute prompts."""
        scheduler = self.services.config.scheduler
        strict = scheduler.mode is SchedulerMode.STRICT
        return self.services.kv_caches[: scheduler.prefill_workers if strict else 1]
