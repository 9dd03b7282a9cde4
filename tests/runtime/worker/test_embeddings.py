"""Requests for embeddings on the null model, whose hidden state of token t is the unit vector t % 16 of 16."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sageLLM.records import FinishReason, Pooling
from sageLLM.runtime.worker.executor import NullExecutor

MODES = ({}, {"mode": "time_share"}, {"mode": "strict"}, {"mode": "strict", "prefill_workers": 2, "decode_workers": 2})


def expected(prompt, pooling):
    hidden = np.eye(16, dtype=np.float32)[np.array(prompt) % 16]
    pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
    return pooled / np.linalg.norm(pooled)


def check(sequence):
    assert sequence.error is None
    prompt = sequence.prompt_tokens.tolist()
    np.testing.assert_allclose(sequence.embedding, expected(prompt, sequence.request.pooling), rtol=1e-6)
    assert sequence.embedding.dtype == np.float32
    (choice,) = sequence.choices
    assert (choice.output_tokens, choice.finish_reason, choice.stop_matched) == ([], FinishReason.STOP, None)


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_prompts_in_chunks_beside_rows_that_decode(bench, null_tokens, pooling, mode):
    b = bench(max_step_tokens=5, **mode)
    prompts = [[5], [5, 6, 7], list(range(23)), [9] * 17 + [3]]
    pooled = [b.pooled(prompt, pooling) for prompt in prompts]
    others = [b.sequence(prompt, max_new_tokens=9) for prompt in prompts]
    b.offer(*(sequence for pair in zip(others, pooled, strict=True) for sequence in pair))
    b.run()
    for sequence in pooled:
        check(sequence)
    for sequence in others:
        assert sequence.choices[0].output_tokens == null_tokens(len(sequence.prompt_tokens), 9)
    b.check_nothing_leaks()


def test_nothing_is_sampled_and_no_step_computes_more_than_the_prompt(bench, recorder_of):
    b = bench(executor=(recorder := recorder_of(NullExecutor(8))), max_step_tokens=4)
    b.offer(b.pooled(range(10), Pooling.MEAN))
    b.run()
    assert [(plan.num_tokens, len(plan.sample_slots)) for plan in recorder.plans] == [(4, 0), (4, 0), (2, 0)]


def test_a_worker_that_decodes_never_hears_of_it(bench):
    b = bench(mode="strict")
    decode = b.leases.decode[0]
    sequence = b.pooled(range(10), Pooling.LAST)
    b.offer(sequence)
    assert b.leases.announce(sequence)
    (lease,) = b.leases.grant([sequence])
    assert lease.handover is None
    assert (decode.free_slots, decode.kv.available()) == (decode.num_slots, decode.kv.num_blocks)


def test_last_reuses_a_cached_prefix_and_mean_computes_it_again(bench):
    b = bench()
    for pooling, hit in ((Pooling.MEAN, 0), (Pooling.MEAN, 0), (Pooling.LAST, 19), (None, 19)):
        sequence = b.sequence(range(20)) if pooling is None else b.pooled(range(20), pooling)
        b.offer(sequence)
        b.run()
        assert sequence.prefix_hit_tokens == hit
        if pooling is not None:
            check(sequence)
    b.check_nothing_leaks()


@pytest.mark.parametrize("pooling", Pooling)
def test_a_prompt_that_fills_the_pool(bench, pooling):
    """There is no room for an output, and none is needed."""
    b = bench(blocks=5, max_step_tokens=6)
    sequence = b.pooled(range(20), pooling)
    b.offer(sequence)
    b.run()
    check(sequence)
    b.check_nothing_leaks()


@pytest.mark.parametrize("often", [0, 0.1])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_rows_that_are_preempted_or_lost_begin_again(bench, losing_executor, mode, often):
    chance = random.Random(3)
    preemptions = 0

    def make_executor():
        return losing_executor(NullExecutor(8), lambda null: null._prompt_length.fill(0), chance, often)

    for seed in range(2):
        executor = make_executor if mode.get("mode") == "strict" else make_executor()
        b = bench(blocks=14, max_step_tokens=3, executor=executor, slow_doors=True, uneven=True, seed=seed, **mode)
        prompts = [[chance.randrange(50) for _ in range(chance.randint(1, 30))] for _ in range(6)]
        pooled = [b.pooled(prompt, chance.choice([*Pooling])) for prompt in prompts]
        b.offer(*(b.sequence([4] * 6, max_new_tokens=25) for _ in range(3)), *pooled)
        b.run()
        for sequence in pooled:
            check(sequence)
        b.check_nothing_leaks()
        preemptions += b.worker.preemptions
    assert preemptions > 0 or (mode.get("mode") == "strict" and not often)  # prompts take no blocks from each other


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("after", range(5))
def test_a_cancelled_one_ends_wherever_it_is(bench, mode, after):
    b = bench(max_step_tokens=4, slow_doors=True, **mode)
    sequence, other = b.pooled(range(12), Pooling.MEAN), b.pooled([7] * 9, Pooling.MEAN)
    b.offer(sequence, other)
    turns = iter(range(1000))
    b.run(between=lambda: next(turns) == after and b.worker.cancel([sequence.request]))
    assert sequence.choices[0].finish_reason == FinishReason.CANCELLED
    check(other)
    b.check_nothing_leaks()


def test_a_step_that_fails_takes_its_rows_with_it(bench, monkeypatch):
    null = NullExecutor(8)
    b = bench(executor=null, max_step_tokens=4, max_prefill_batch=1)
    first, second = b.pooled(range(12), Pooling.MEAN), b.pooled(range(9), Pooling.MEAN)
    launch, failing = null.launch, iter([False, True])
    monkeypatch.setattr(null, "launch", lambda plan: 1 / 0 if next(failing, False) else launch(plan))
    b.offer(first, second)
    b.run()
    assert first.error == "ZeroDivisionError: division by zero"
    check(second)
    b.check_nothing_leaks()
