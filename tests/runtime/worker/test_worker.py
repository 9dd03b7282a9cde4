"""The worker's step loop on the null model: batching, chunking, preemption, endings, and no leaks."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sageLLM.errors import RequestError
from sageLLM.records import FinishReason, TokenLogprobs
from sageLLM.runtime.worker.executor import NullExecutor


def test_one_sequence_gets_its_tokens(bench, null_tokens):
    b = bench()
    b.offer(b.sequence(range(10), max_new_tokens=6))
    (done,) = b.run()
    assert done.choices[0].output_tokens == null_tokens(10, 6)
    assert done.choices[0].finish_reason is FinishReason.LENGTH
    assert done.timings.first_token <= done.timings.last_token <= done.timings.finished
    b.check_nothing_leaks()


def test_eos_ends_a_sequence_and_is_its_last_token(bench):
    b = bench()
    eos = 97 + 13 % 26
    b.offer(b.sequence(range(10), max_new_tokens=50, eos=(eos,)))
    (done,) = b.run()
    assert done.choices[0].output_tokens[-1] == eos
    assert len(done.choices[0].output_tokens) == 4
    assert done.choices[0].finish_reason is FinishReason.STOP
    assert done.choices[0].stop_matched == eos
    b.check_nothing_leaks()


def test_streaming_gives_every_token_once_and_before_the_end(bench, null_tokens):
    b = bench()
    b.offer(b.sequence(range(5), max_new_tokens=7, stream=True))
    b.run()
    assert [t for delta in b.deltas for t in delta.tokens] == null_tokens(5, 7)


def test_n_choices_compute_the_prompt_once(bench, null_tokens):
    b = bench()
    b.offer(b.sequence(range(10), max_new_tokens=5, n=3))
    (done,) = b.run()
    assert [c.output_tokens for c in done.choices] == [null_tokens(10, 5)] * 3
    assert b.kv.stats().queries == 1
    b.check_nothing_leaks()


def test_a_shared_prefix_in_flight_is_computed_once(bench):
    b = bench(max_prefill_batch=8)
    shared = list(range(40))
    b.offer(*(b.sequence([*shared, 100 + i, 7]) for i in range(5)))
    done = b.run()
    assert sorted(s.prefix_hit_tokens for s in done) == [0, 40, 40, 40, 40]
    b.check_nothing_leaks()


def test_without_kv_commit_nobody_waits_for_a_prefix(bench):
    b = bench(commit=False)
    b.offer(*(b.sequence(range(40)) for _ in range(5)))
    assert len(b.run()) == 5
    b.check_nothing_leaks()


def test_a_hit_inside_a_block_is_token_granular(bench):
    b = bench(block_size=16)
    b.offer(b.sequence([1, 2, 3, 4, 5, 6, 7, 8]))
    b.run()
    b.offer(b.sequence([1, 2, 3, 4, 5, 60, 70, 80]))
    assert b.run()[-1].prefix_hit_tokens == 5
    b.check_nothing_leaks()


def test_outputs_are_committed_for_the_next_turn(bench, null_tokens):
    b = bench()
    b.offer(b.sequence(range(10), max_new_tokens=6))
    b.run()
    b.offer(b.sequence([*range(10), *null_tokens(10, 6), 3]))
    assert b.run()[-1].prefix_hit_tokens == 15  # the sixth output's KV was never computed
    b.check_nothing_leaks()


def test_a_choice_that_ends_at_once_commits_no_block_that_nobody_has_copied_yet(bench):
    class FirstEnds(NullExecutor):
        def launch(self, plan):
            handle = super().launch(plan)
            handle.result().tokens[(plan.sample_slots == 1) & (plan.sample_steps == 0)] = 2
            return handle

    b = bench(executor=FirstEnds(8))
    b.worker.on_prefilled = lambda sequences: (b._hand_over(sequences), b.kv.clear())  # as if its time to live was over
    sequence = b.sequence(range(40, 46), max_new_tokens=4, n=2, eos=(2,))
    b.offer(sequence)

    def check():
        assert b.finished or not b.kv.stats().cached_blocks

    b.run(between=check)
    assert [len(choice.output_tokens) for choice in sequence.choices] == [4, 1]
    b.check_nothing_leaks()


def test_tenants_do_not_share(bench):
    b = bench()
    b.offer(b.sequence(range(20), tenant="a"))
    b.run()
    b.offer(b.sequence(range(20), tenant="b"))
    assert b.run()[-1].prefix_hit_tokens == 0


def test_preempted_rows_finish_with_the_same_tokens(bench, null_tokens):
    b = bench(blocks=12)  # 48 tokens for four sequences that want 4 * 24
    b.offer(*(b.sequence([i] * 8, max_new_tokens=16) for i in range(4)))
    done = b.run()
    assert [s.choices[0].output_tokens for s in done] == [null_tokens(8, 16)] * 4
    assert b.worker.preemptions > 0
    b.check_nothing_leaks()


def test_what_can_never_fit_is_refused_at_once(bench):
    b = bench(blocks=4)
    with pytest.raises(RequestError, match="needs 5 KV blocks, the pool has 4"):
        b.offer(b.sequence(range(10), max_new_tokens=10))


def test_cancel_frees_everything_within_a_step(bench):
    b = bench()
    victim = b.sequence(range(10), max_new_tokens=200)
    b.offer(victim, b.sequence(range(20, 30)))
    for _ in range(5):
        b.worker.submit_prefill(b.waiting.take_granted())
        b.worker.step()
    b.worker.cancel([victim.request])
    b.worker.step()
    assert victim.choices[0].finish_reason is FinishReason.CANCELLED
    b.run()
    b.check_nothing_leaks()


def test_a_request_past_its_timeout_ends_with_it(bench):
    b = bench(request_timeout_s=1e-6, queue_timeout_s=0)
    late = b.sequence(range(10), interactive=True)
    b.offer(late)
    (done,) = b.run()
    assert done.choices[0].finish_reason is FinishReason.TIMEOUT
    b.check_nothing_leaks()


def test_every_time_is_the_injected_clocks(bench):
    now = [1000.0]
    b = bench(clock=lambda: now[0], launch_ahead=False)
    call = b.sequence([1, 2], max_new_tokens=2)
    b.offer(call)
    for now[0] in (1001.0, 1002.0, 1003.0):
        b.worker.submit_prefill(b.waiting.take_granted())
        b.worker.step()
    assert b.finished == [call]
    times = call.timings
    assert (times.queued, times.scheduled, times.first_token) == (1000, 1001, 1001)
    assert (times.last_token, times.finished) == (1002, 1002)


def test_timeouts_pass_by_the_injected_clock(bench):
    now = [0.0]
    b = bench(clock=lambda: now[0], max_batch_size=1, queue_timeout_s=10, request_timeout_s=30)
    first, second = (b.sequence([1, 2, 3], max_new_tokens=200, interactive=True) for _ in range(2))
    first.request.arrival = second.request.arrival = 0.0
    b.offer(first, second)
    for now[0] in range(60):
        b.finished += b.waiting.take_ended()
        b.worker.submit_prefill(b.waiting.take_granted())
        b.worker.step()
    assert [(call, call.choices[0].finish_reason) for call in b.finished] == [
        (second, "queue_timeout"),
        (first, "timeout"),
    ]
    assert (second.timings.finished, first.timings.finished) == (10, 31)
    b.kv.clear()
    b.check_nothing_leaks()


def test_a_step_is_launched_at_one_time_and_read_at_another(bench):
    """What a driver in virtual time does: `step` is `launch`, maybe `read_oldest`, and `post`."""
    now = [0.0]
    b = bench(clock=lambda: now[0])
    call = b.sequence([1, 2, 3], max_new_tokens=1)
    b.offer(call)
    b.worker.submit_prefill(b.waiting.take_granted())
    assert b.worker.launch()
    assert (b.worker.num_unread, b.worker.is_full) == (1, False)
    now[0] = 7.0
    assert not b.worker.launch()
    b.worker.read_oldest()
    b.worker.post()
    assert (b.worker.num_unread, call.timings.first_token, call.timings.last_token) == (0, 7, None)
    b.run()
    assert b.finished == [call]


def test_a_dropped_record_gives_its_lease_back(bench):
    b = bench()
    lost_early, lost_late = b.sequence(range(10)), b.sequence(range(50, 60))
    b.offer(lost_early, lost_late)
    granted = b.waiting.take_granted()
    assert b.leases.reclaim(lost_early.request)
    b.worker.on_prefilled = lambda sequences: None
    b.worker.submit_prefill(granted[1:])
    for _ in range(4):
        b.worker.step()
    b.worker.reclaim([lost_late.request])
    b.worker.step()
    b.check_nothing_leaks()


class BrokenExecutor(NullExecutor):
    """Fails every step that computes a prompt with token 13 in it."""

    def launch(self, plan):
        if any(13 in chunk.tokens for chunk in plan.chunks):
            raise MemoryError("no room")
        return super().launch(plan)


def test_a_failing_step_fails_its_sequences_and_no_others(bench):
    b = bench(executor=BrokenExecutor(8), max_prefill_batch=1)
    b.offer(b.sequence([13] * 5), b.sequence([1] * 5))
    bad, good = b.run()
    assert bad.error == "MemoryError: no room"
    assert bad.choices[0].finish_reason is FinishReason.ERROR
    assert good.error is None
    b.check_nothing_leaks()


class FailedHandle:
    def __init__(self, error):
        self.error = error

    def result(self):
        raise self.error


class LateExecutor(NullExecutor):
    """Tells prompt logprobs, or an error, of prompts with token 13 in them only when the step is read."""

    def __init__(self, num_slots, error=None):
        super().__init__(num_slots)
        self.error = error

    def launch(self, plan):
        handle = super().launch(plan)
        if any(13 in chunk.tokens for chunk in plan.chunks):
            if self.error is not None:
                return FailedHandle(self.error)
            handle.result().prompt_logprobs[0] = [TokenLogprobs(13, -1.0, [])]
        return handle


@pytest.mark.parametrize("error", [None, MemoryError("no room")])
def test_what_a_step_tells_late_is_not_taken_for_the_slots_next_row(bench, error):
    b = bench(executor=LateExecutor(1, error), max_batch_size=1, max_step_tokens=3)
    first, second = b.sequence([13] * 5), b.sequence([1] * 5)
    b.offer(first, second)
    b.worker.submit_prefill(b.waiting.take_granted())
    b.worker.step()
    b.worker.cancel([first.request])
    # The slot has a new row before the step above is read: granted on another thread while the inbox is emptied.
    b.worker._inbox.append((lambda _: b.worker.submit_prefill(b.waiting.take_granted()), None))
    b.run()
    assert first.choices[0].finish_reason is FinishReason.CANCELLED
    assert (second.error, second.prompt_logprobs) == (None, None)
    assert second.choices[0].finish_reason is FinishReason.LENGTH
    b.check_nothing_leaks()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mix_ends_without_leaks(bench, null_tokens, data):
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    blocks, slots = data.draw(st.integers(24, 80)), data.draw(st.integers(3, 8))
    b = bench(
        blocks=blocks,
        block_size=data.draw(st.sampled_from([1, 4, 16])) if blocks > 60 else 4,
        commit=data.draw(st.booleans()),
        max_batch_size=slots,
        max_prefill_batch=data.draw(st.integers(1, min(4, slots))),
        max_decode_batch=data.draw(st.integers(1, slots)),
        max_step_tokens=data.draw(st.integers(1, 40)),
        launch_ahead=data.draw(st.booleans()),
    )
    sequences = []
    for _ in range(data.draw(st.integers(1, 14))):
        prompt = [*range(rng.choice([0, 7, 16])), *(rng.randrange(5) for _ in range(rng.randint(1, 20)))]
        n, stream = rng.choice([1, 1, 1, 2, 3]), rng.random() < 0.3
        sequence = b.sequence(prompt, max_new_tokens=rng.randint(1, 20), n=n, stream=stream)
        try:
            b.offer(sequence)
        except RequestError:
            continue
        sequences.append(sequence)
    done = b.run()
    assert sorted(map(id, done)) == sorted(map(id, sequences))
    for sequence in sequences:
        expected = null_tokens(len(sequence.prompt_tokens), sequence.sampling.max_new_tokens)
        assert [c.output_tokens for c in sequence.choices] == [expected] * sequence.sampling.n
    b.check_nothing_leaks()
