"""The device's memory is gone: every row goes on from the outputs that were read, and nobody notices."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sageLLM.errors import ExecutorLostError
from sageLLM.kv_runtime import Commit, KVCache
from sageLLM.records import FinishReason
from sageLLM.runtime.worker.disaggregated import PrefillWorker
from sageLLM.runtime.worker.executor import NullExecutor


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**16),
    often=st.sampled_from([0.02, 0.1, 0.2]),
    blocks=st.sampled_from([20, 64]),
    launch_ahead=st.booleans(),
    slow_doors=st.booleans(),
    mode=st.sampled_from([{}, {"mode": "time_share"}, {"mode": "strict"}, {"mode": "strict", "decode_workers": 2}]),
)
def test_every_request_gets_the_tokens_it_would_have_got(
    bench, losing_executor, reading_executor, expected_tokens, seed, often, blocks, launch_ahead, slow_doors, mode
):
    chance = random.Random(seed)
    options = {"launch_ahead": launch_ahead, "slow_doors": slow_doors, "max_step_tokens": 12, "seed": seed, **mode}

    def make():
        return losing_executor(reading_executor(blocks, 4), reading_executor.forget, chance, often)

    b = bench(blocks=blocks, executor=make if mode.get("mode") == "strict" else make(), **options)
    sequences = []
    for number in range(12):
        prompt = [chance.choice((7, 8))] * chance.choice((3, 8, 17)) + [number] * chance.randint(1, 5)
        sequences.append(
            b.sequence(prompt, max_new_tokens=chance.randint(1, 12), n=chance.choice((1, 1, 2)), stream=number % 3 == 0)
        )
    b.offer(*sequences)
    assert sorted(map(id, b.run())) == sorted(map(id, sequences))
    for sequence in sequences:
        assert sequence.error is None
        outputs = expected_tokens(sequence.prompt_tokens.tolist(), sequence.sampling.max_new_tokens)
        assert [choice.output_tokens for choice in sequence.choices] == [outputs] * sequence.sampling.n
        if sequence.request.stream:
            for index in range(sequence.sampling.n):
                deltas = [d for d in b.deltas if d.sequence is sequence and d.choice == index]
                assert [token for delta in deltas for token in delta.tokens] == outputs
    b.check_nothing_leaks()


@pytest.fixture
def poisoned(reading_executor):
    class Poisoned(reading_executor):
        """Lost whenever a step computes token 13."""

        def launch(self, plan):
            handle = super().launch(plan)
            if any(13 in chunk.tokens for chunk in plan.chunks):
                handle.result = self.lose
            return handle

        def lose(self):
            self.forget()
            raise ExecutorLostError("process 1 was killed by SIGKILL")

    return Poisoned


@pytest.mark.parametrize("mode", ["hybrid", "strict"])
def test_a_request_that_kills_whoever_computes_it_is_given_up(bench, poisoned, expected_tokens, mode):
    executor = (lambda: poisoned(64, 4)) if mode == "strict" else poisoned(64, 4)
    b = bench(mode=mode, executor=executor, max_step_tokens=8, max_prefill_batch=1, launch_ahead=False)
    before, deadly, behind = b.sequence([1] * 7, 9), b.sequence([*range(20, 30), 13], 9), b.sequence([2] * 20, 9)
    b.offer(before, deadly, behind)
    b.run()
    assert deadly.error == "process 1 was killed by SIGKILL; 3 times while this was computed"
    assert deadly.choices[0].finish_reason is FinishReason.ERROR
    for sequence in (before, behind):
        assert sequence.error is None
        assert sequence.choices[0].output_tokens == expected_tokens(sequence.prompt_tokens.tolist(), 9)
    b.check_nothing_leaks()


class Dead(NullExecutor):
    """Lost whenever it is looked at."""

    def ready(self):
        raise ExecutorLostError("process 1 was killed by SIGKILL")


def test_lost_again_and_again_it_is_given_up(bench):
    b = bench(executor=Dead(8))
    b.offer(b.sequence([1, 2, 3]))
    b.worker.submit_prefill(b.waiting.take_granted())
    with pytest.raises(ExecutorLostError, match="SIGKILL; 4 times without a step in between") as raised:
        b.worker.step()
    back = []
    b.worker.on_prefilled = back.extend
    b.worker.abandon(raised.value)
    (ended,) = back
    assert ended.choices[0].finish_reason is FinishReason.ERROR
    assert "SIGKILL" in ended.error
    b.check_nothing_leaks()


def test_a_cancelled_request_ends_while_a_new_executor_starts(bench):
    executor = NullExecutor(8)
    b = bench(executor=executor)
    sequence = b.sequence([1, 2, 3], max_new_tokens=50)
    b.offer(sequence)
    b.worker.submit_prefill(b.waiting.take_granted())
    for _ in range(4):
        b.worker.step()
    executor.ready = lambda: False
    b.worker.cancel([sequence.request])
    assert b.worker.step()
    assert sequence.choices[0].finish_reason is FinishReason.CANCELLED
    b.check_nothing_leaks()


def test_what_was_computed_before_the_loss_is_not_committed_after_it():
    kv = KVCache(8, 4)
    tokens, blocks = np.arange(8, dtype=np.int32), kv.allocate(2)
    commit = Commit(tokens, blocks, ("", ""), kv.generation)
    kv.lose()
    kv.release(blocks)
    assert kv.commit_all([commit]) == 0
    assert kv.match(tokens, ("", ""), 8).tokens == 0
    kv.check_integrity(owners=[])


@pytest.fixture
def lost_in_transfer(reading_executor):
    class LostInTransfer(reading_executor):
        """Lost once, when the result of the step that was to hand KV over is asked for."""

        lost = False

        def launch(self, plan):
            handle = super().launch(plan)
            if plan.exports and not self.lost:
                self.lost = True
                handle.result = self.lose
            return handle

        def lose(self):
            self.forget()
            raise ExecutorLostError("process 1 was killed by SIGKILL")

    return LostInTransfer


@pytest.mark.parametrize("wanted", ["recompute", "fail"])
def test_a_prefill_worker_that_is_lost_during_a_transfer(bench, lost_in_transfer, expected_tokens, monkeypatch, wanted):
    monkeypatch.setattr(PrefillWorker, "fails_with_transfer", wanted == "fail")
    b = bench(mode="strict", executor=lambda: lost_in_transfer(64, 4), max_step_tokens=8, launch_ahead=False)
    moving, waiting = b.sequence(range(8), max_new_tokens=6), b.sequence(range(20, 24), max_new_tokens=6)
    b.offer(moving, waiting)
    b.run()
    assert waiting.choices[0].output_tokens == expected_tokens(range(20, 24), 6)
    if wanted == "fail":
        assert moving.error == "its KV could not be handed over to decode: process 1 was killed by SIGKILL"
        assert moving.choices[0].finish_reason is FinishReason.ERROR
    else:
        assert moving.choices[0].output_tokens == expected_tokens(range(8), 6)
    b.check_nothing_leaks()
