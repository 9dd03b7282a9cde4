"""A worker on the null model, driven by hand: what the operators do, without a flow."""

from __future__ import annotations

import random
import time
from collections import deque
from itertools import count

import numpy as np
import pytest

from sageLLM.config import KVCacheConfig, SchedulerConfig, SchedulerMode
from sageLLM.kv_runtime import KVCache, make_eviction_policy
from sageLLM.kv_runtime.tiers import KVTiers
from sageLLM.records import Request, SamplingParams, Sequence
from sageLLM.runtime.scheduler.handover import PairedLeases
from sageLLM.runtime.scheduler.lease import LeaseBook, PrefixHint
from sageLLM.runtime.scheduler.pin_book import PinBook
from sageLLM.runtime.scheduler.policies import make_scheduler_policy
from sageLLM.runtime.scheduler.swap import Swap
from sageLLM.runtime.scheduler.timeouts import Timeouts
from sageLLM.runtime.scheduler.waiting import WaitingQueue
from sageLLM.runtime.worker.disaggregated import DecodeWorker, DisaggregatedWorkers, PrefillWorker
from sageLLM.runtime.worker.executor import NullExecutor
from sageLLM.runtime.worker.worker import Worker


class Bench:
    """Waiting queue, leases, KV books and workers; `run` plays schedule, prefill, kv_commit and decode.

    For `kv_cache`'s `eviction` and `ttl_s` a second passes each time that the KV books look at their clock. With mode
    strict `executor` is a function that makes one for each worker; `seed` says in which order the workers take turns.
    With `slow_doors` sequences are on their way to a worker for a step or more; `uneven` lets a worker take several
    steps while another takes one.
    `tiers` are the arguments of KVTiers below the first worker's pool; its copier takes turns in `run`, by `seed`;
    with `swap` preempted rows go there.
    """

    def __init__(
        self,
        blocks=64,
        block_size=4,
        commit=True,
        executor=None,
        stop_matcher=None,
        kv_cache=(),
        tiers=None,
        swap=False,
        clock=time.monotonic,
        seed=0,
        slow_doors=False,
        uneven=False,
        step_cost=None,
        **scheduler,
    ):
        config = SchedulerConfig(**{"max_batch_size": 8, **scheduler})
        kv_config = KVCacheConfig(**dict(kv_cache))
        ticks = count().__next__
        self.kvs = [
            KVCache(
                blocks, block_size, policy=make_eviction_policy(kv_config.eviction), ttl_s=kv_config.ttl_s, clock=ticks
            )
            for _ in range(config.num_workers)
        ]
        self.kv = self.kvs[0]
        policy = make_scheduler_policy(config, lambda prompts: self.leases.count_cached(prompts, touch=False))
        slots = config.num_slots
        strict = config.mode is SchedulerMode.STRICT
        if strict:
            self.leases = PairedLeases.over(self.kvs, config.prefill_workers, slots, block_size, policy)
            books = [*self.leases.prefill, *self.leases.decode]
        else:
            self.leases = LeaseBook(self.kv, slots, block_size, policy)
            books = [self.leases]
        self.books = books
        self.pins = PinBook(self.kvs, blocks // 2)
        self.pins.served = True
        self.waiting = WaitingQueue(self.leases, Timeouts.of(config), clock)
        make_executor = executor if strict and executor else lambda: executor or NullExecutor(slots)
        executors = [make_executor() for _ in books]
        kinds = (
            [PrefillWorker] * config.prefill_workers + [DecodeWorker] * config.decode_workers if strict else [Worker]
        )
        workers = [
            kind(
                each,
                book.kv,
                book,
                config,
                4096,
                config.max_step_tokens or 64,
                stop_matcher or (lambda s: None),
                clock,
                step_cost,
            )
            for kind, each, book in zip(kinds, executors, books, strict=True)
        ]
        if strict:
            prefill, decode = workers[: config.prefill_workers], workers[config.prefill_workers :]
            for each in executors[: len(prefill)]:
                each.connect([peer.pool for peer in executors[len(prefill) :]])
            self.worker = DisaggregatedWorkers(prefill, decode)
        else:
            (self.worker,) = workers
        self.executors = executors
        self._chance = random.Random(seed)
        self.jobs = deque()
        self.tiers = []
        for book, each, worker in zip(books, executors, workers, strict=True) if tiers is not None else ():
            if isinstance(worker, DecodeWorker) and not swap:
                continue
            book.tiers = KVTiers(book.kv, each.block_io, submit=self.jobs.append, **tiers)
            each.before_step = book.tiers.flush
            book.tiers.fetcher.on_fetched.append(self.tell)
            if swap:
                worker.blocks.swap = Swap(book.tiers)
            self.tiers.append(book.tiers)
        self.commit = commit
        self.slow_doors = slow_doors
        self.uneven = uneven
        self.entering = deque([[]] if slow_doors else [])
        self.between = []
        self.deltas = []
        self.finished = []
        self.worker.on_prefilled = self._prefilled
        self.worker.on_decoded = self._decoded
        self.worker.on_leases_returned = self.tell
        self._told = True  # as `schedule`, it looks for room only when it is told that there may be some

    def tell(self):
        self._told = True

    def _prefilled(self, sequences):
        if self.slow_doors:
            self.between.append(sequences)
        else:
            self._hand_over(sequences)

    def _hand_over(self, sequences):
        for sequence in sequences:
            if not sequence.ended and self.commit:
                sequence.kv.commit_outputs = True
                self.leases.commit([sequence])
                self.tell()
        self.finished += [sequence for sequence in sequences if sequence.ended]
        self.worker.submit_decode([sequence for sequence in sequences if not sequence.ended])

    def _decoded(self, records):
        for record in records:
            (self.finished if isinstance(record, Sequence) else self.deltas).append(record)

    def sequence(
        self, prompt, max_new_tokens=4, stream=False, tenant="", eos=(), interactive=False, pin=False, guide=None,
        **sampling,
    ):  # fmt: skip
        params = SamplingParams(max_new_tokens=max_new_tokens, **sampling).with_defaults(temperature=0.0)
        request = Request(
            "r", prompt_tokens=list(prompt), stream=stream, tenant=tenant, interactive=interactive, pin=pin
        )
        sequence = Sequence(request, np.asarray(prompt, np.int32), params, eos, guide)
        sequence.kv = PrefixHint(0)
        return sequence

    def pooled(self, prompt, pooling, **options):
        """A sequence that asks for its prompt's embedding."""
        sequence = self.sequence(prompt, max_new_tokens=0, **options)
        sequence.request.pooling = pooling
        return sequence

    def offer(self, *sequences):
        for sequence in sequences:
            self.leases.check_fits(sequence)
            self.pins.check(sequence, self.leases.prompt_blocks(sequence), self.leases.max_blocks(sequence))
            if self.tiers:
                self.leases.look_below(sequence)
                sequence.kv.fetcher.is_coming(sequence.kv.fetch)
            self.waiting.offer(sequence)
            self.tell()

    def _grant_if_told(self):
        granted = self.waiting.take_granted() if self._told else []
        self._told = bool(granted)
        return granted

    def grant(self, sequence):
        granted = self.leases.grant([sequence])
        return granted[0] if granted else None

    def run(self, limit=10_000, between=lambda: None):
        for _ in range(limit):
            between()
            if self.jobs and self._chance.random() < 0.2:
                self.jobs.popleft()()
            self.finished += self.waiting.take_ended()
            self.entering.append(self._grant_if_told())
            if granted := self.entering.popleft():
                self.worker.submit_prefill(granted)
            on_their_way = len(self.between)
            stands_still = not self.step() and not len(self.waiting) and not self.worker.num_running
            if on_their_way:
                self._hand_over(self.between.pop(0))
            elif stands_still and not any(self.entering) and not self.between:
                return self.finished
        raise AssertionError(f"not done after {limit} steps: {len(self.waiting)} waiting")

    def reclaim(self, sequence):
        """Its request has ended elsewhere: what `EngineServices.release` does."""
        if self.leases.reclaim(sequence.request):
            self.tell()
        self.worker.reclaim([sequence.request])

    def step(self):
        """A step of each worker, or several, in any order; False when all of them are idle."""
        workers = [*self.worker.workers]
        self._chance.shuffle(workers)
        counts = self._chance.choices((1, 4) if self.uneven else (1,), k=len(workers))
        worked = [worker.step() for worker, count in zip(workers, counts, strict=True) for _ in range(count)]
        return any(worked)

    def close(self):
        for executor in self.executors:
            executor.close()

    def check_nothing_leaks(self):
        while self.jobs:
            self.jobs.popleft()()
        for tiers in self.tiers:
            tiers.check_integrity()
        for book in self.books:
            assert book.free_slots == book.num_slots
            assert not book.any_in_transit
            assert not book._computing
            assert not book.load
            book.kv.check_integrity(owners=[])
            assert book.kv.available() == book.kv.num_blocks - book.kv.num_pinned


@pytest.fixture
def bench():
    return Bench


def null_tokens(prompt_length, count):
    """What the null model says."""
    return [97 + (prompt_length + k) % 26 for k in range(count)]


@pytest.fixture(name="null_tokens")
def null_tokens_fixture():
    return null_tokens


class Recorder:
    """An executor that remembers the plans of another."""

    def __init__(self, inner):
        self.inner, self.plans = inner, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def launch(self, plan):
        self.plans.append(plan)
        return self.inner.launch(plan)


@pytest.fixture
def recorder_of():
    """`recorder_of(executor)`: the same, with its `plans`."""
    return Recorder
