"""A worker on the null model, driven by hand: what the operators do, without a flow."""

from __future__ import annotations

import time
from itertools import count

import numpy as np
import pytest

from sageLLM.config import KVCacheConfig, SchedulerConfig
from sageLLM.kv_runtime import KVCache, make_eviction_policy
from sageLLM.records import Request, SamplingParams, Sequence
from sageLLM.runtime.scheduler.lease import LeaseBook, PrefixHint, namespace_of
from sageLLM.runtime.scheduler.policies import make_scheduler_policy
from sageLLM.runtime.scheduler.timeouts import Timeouts
from sageLLM.runtime.scheduler.waiting import WaitingQueue
from sageLLM.runtime.worker.executor import NullExecutor
from sageLLM.runtime.worker.worker import Worker


class Bench:
    """Waiting queue, leases, KV books and a worker; `run` plays schedule, prefill, kv_commit and decode.

    For `kv_cache`'s `eviction` and `ttl_s` a second passes each time that the KV books look at their clock.
    """

    def __init__(
        self,
        blocks=64,
        block_size=4,
        commit=True,
        executor=None,
        stop_matcher=None,
        kv_cache=(),
        clock=time.monotonic,
        **scheduler,
    ):
        config = SchedulerConfig(**{"max_batch_size": 8, **scheduler})
        kv_config = KVCacheConfig(**dict(kv_cache))
        policy = make_eviction_policy(kv_config.eviction)
        self.kv = KVCache(blocks, block_size, policy=policy, ttl_s=kv_config.ttl_s, clock=count().__next__)
        self.leases = LeaseBook(self.kv, config.max_batch_size, block_size, make_scheduler_policy(config, self.kv))
        self.waiting = WaitingQueue(self.leases, Timeouts.of(config), clock)
        executor = executor or NullExecutor(config.max_batch_size)
        self.worker = Worker(
            executor,
            self.kv,
            self.leases,
            config,
            4096,
            config.max_step_tokens or 64,
            stop_matcher or (lambda s: None),
            clock,
        )
        self.commit = commit
        self.deltas = []
        self.finished = []
        self.worker.on_prefilled = self._prefilled
        self.worker.on_decoded = self._decoded

    def _prefilled(self, sequences):
        for sequence in sequences:
            if not sequence.ended and self.commit:
                self.kv.commit(sequence.prompt_tokens, sequence.kv.blocks, namespace_of(sequence))
                sequence.kv.commit_outputs = True
                self.leases.prefix_computed(sequence, sequence.kv)
        self.worker.submit_decode(sequences)

    def _decoded(self, records):
        for record in records:
            (self.finished if isinstance(record, Sequence) else self.deltas).append(record)

    def sequence(self, prompt, max_new_tokens=4, stream=False, tenant="", eos=(), interactive=False, **sampling):
        params = SamplingParams(max_new_tokens=max_new_tokens, **sampling).with_defaults(temperature=0.0)
        request = Request("r", prompt_tokens=list(prompt), stream=stream, tenant=tenant, interactive=interactive)
        sequence = Sequence(request, np.asarray(prompt, np.int32), params, eos)
        sequence.kv = PrefixHint(0)
        return sequence

    def offer(self, *sequences):
        for sequence in sequences:
            self.leases.check_fits(sequence)
            self.waiting.offer(sequence)

    def grant(self, sequence):
        granted = self.leases.grant([sequence])
        return granted[0] if granted else None

    def run(self, limit=10_000):
        for _ in range(limit):
            self.finished += self.waiting.take_ended()
            granted = self.waiting.take_granted()
            if granted:
                self.worker.submit_prefill(granted)
            if not self.worker.step() and not len(self.waiting) and not self.worker.num_running:
                return self.finished
        raise AssertionError(f"not done after {limit} steps: {len(self.waiting)} waiting")

    def check_nothing_leaks(self):
        assert self.leases.free_slots == self.leases.num_slots
        assert not self.leases.any_in_transit
        assert not self.leases._computing
        self.kv.check_integrity(owners=[])
        assert self.kv.available() == self.kv.num_blocks


@pytest.fixture
def bench():
    return Bench


def null_tokens(prompt_length, count):
    """What the null model says."""
    return [97 + (prompt_length + k) % 26 for k in range(count)]


@pytest.fixture(name="null_tokens")
def null_tokens_fixture():
    return null_tokens
