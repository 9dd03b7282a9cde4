"""Mode strict: a prompt's KV goes from the worker that computes it to the one that decodes, or is computed again."""

from __future__ import annotations

import pytest

from sageLLM.records import FinishReason
from sageLLM.runtime.worker.executor import NullExecutor


class LosingExecutor(NullExecutor):
    """The exports that a test names, counted from 0, fail."""

    def __init__(self, num_slots, lost):
        super().__init__(num_slots)
        self.lost, self.exported = lost, []

    def launch(self, plan):
        handle = super().launch(plan)
        result = handle.result()
        for index, export in enumerate(plan.exports):
            if len(self.exported) in self.lost:
                result.failed_exports[index] = "the test says so"
            self.exported.append((export.start, export.end, len(export.source_blocks)))
        return handle


@pytest.fixture
def strict(bench):
    """`strict(lost={1}, ...)`: a bench with mode strict whose prefill executor loses these exports."""

    def make(lost=(), **options):
        slots = options.setdefault("max_batch_size", 8)
        return bench(mode="strict", executor=lambda: LosingExecutor(slots, lost), **options)

    return make


def test_a_sequence_moves_from_one_worker_to_the_other(strict, null_tokens):
    b = strict()
    sequence = b.sequence(range(5, 15), max_new_tokens=6)
    b.offer(sequence)
    b.run()
    assert sequence.choices[0].output_tokens == null_tokens(10, 6)
    prefill, decode = b.worker.workers
    assert prefill.steps == 1
    assert decode.steps >= 5
    assert b.executors[0].exported == [(0, 10, 3)]
    b.check_nothing_leaks()


def test_a_prompt_in_chunks_is_sent_in_chunks(strict):
    b = strict(max_step_tokens=6)
    b.offer(b.sequence(range(20)))
    b.run()
    assert b.executors[0].exported == [(0, 6, 2), (6, 12, 2), (12, 18, 2), (18, 20, 1)]


def test_what_the_other_side_has_is_not_sent_again(strict):
    b = strict()
    first, second = b.sequence(range(18)), b.sequence(range(18))
    b.offer(first)
    b.run()
    b.offer(second)
    b.run()
    assert second.prefix_hit_tokens == 17  # all but the last token, as ever
    assert b.executors[0].exported[1:] == [(16, 18, 1)]  # whole blocks of the prompt lie there
    b.check_nothing_leaks()


def test_a_whole_hit_has_next_to_nothing_to_send(strict, null_tokens):
    b = strict()
    for _ in range(3):
        sequence = b.sequence(range(16), max_new_tokens=3)
        b.offer(sequence)
        b.run()
        assert sequence.choices[0].output_tokens == null_tokens(16, 3)
    assert b.executors[0].exported[1:] == [(12, 16, 1), (12, 16, 1)]
    b.check_nothing_leaks()


@pytest.mark.parametrize("lost", [{0}, {1}, {2}, {0, 1, 2}])
def test_kv_that_is_lost_is_computed_by_the_other_side(strict, null_tokens, lost):
    b = strict(lost, max_step_tokens=8)
    sequence = b.sequence(range(20), max_new_tokens=6, n=2)
    b.offer(sequence)
    b.run()
    assert [choice.output_tokens for choice in sequence.choices] == [null_tokens(20, 6)] * 2
    assert b.finished == [sequence]
    b.check_nothing_leaks()


def test_or_the_request_fails_with_what_happened(strict):
    b = strict({1}, max_step_tokens=8)
    b.worker.workers[0].fails_with_transfer = True
    good, bad = b.sequence(range(8), max_new_tokens=3), b.sequence(range(20, 40), max_new_tokens=3)
    b.offer(good, bad)
    b.run()
    assert good.error is None
    assert bad.error == "its KV could not be handed over to decode: the test says so"
    assert bad.choices[0].finish_reason is FinishReason.ERROR
    assert len(b.finished) == 2
    b.check_nothing_leaks()


@pytest.mark.parametrize("after_steps", range(6))
def test_cancelled_at_any_moment_it_gives_back_both_leases(strict, after_steps):
    b = strict(max_step_tokens=8)
    sequence = b.sequence(range(20), max_new_tokens=4)
    b.offer(sequence)
    b.worker.submit_prefill(b.waiting.take_granted())
    for _ in range(after_steps):
        b.step()
    b.worker.cancel([sequence.request])
    b.run()
    assert b.finished == [sequence]
    assert sequence.choices[0].finish_reason in (FinishReason.CANCELLED, FinishReason.LENGTH)
    b.check_nothing_leaks()


@pytest.mark.parametrize("after_steps", range(6))
def test_reclaimed_at_any_moment_nothing_is_left(strict, after_steps):
    """An operator has dropped the record."""
    b = strict(max_step_tokens=8)
    sequence = b.sequence(range(20), max_new_tokens=4)
    b.offer(sequence)
    b.worker.submit_prefill(b.waiting.take_granted())
    for _ in range(after_steps):
        b.step()
    b.leases.reclaim(sequence.request)
    b.worker.reclaim([sequence.request])
    b.run()
    b.check_nothing_leaks()


def test_reclaimed_between_the_doors_nothing_is_left(strict):
    b = strict()
    between = []
    b.worker.on_prefilled = between.extend
    sequence = b.sequence(range(20), max_new_tokens=4)
    b.offer(sequence)
    b.worker.submit_prefill(b.waiting.take_granted())
    while not between:
        b.step()
    b.leases.reclaim(sequence.request)
    b.worker.reclaim([sequence.request])
    b.run()
    b.check_nothing_leaks()


def test_a_first_token_that_ends_the_sequence_ends_it(strict, null_tokens):
    b = strict()
    short = b.sequence(range(7), max_new_tokens=1)
    stopped = b.sequence(range(9), max_new_tokens=5, eos=(null_tokens(9, 1)[0],))
    b.offer(short, stopped)
    b.run()
    assert short.choices[0].finish_reason is FinishReason.LENGTH
    assert stopped.choices[0].finish_reason is FinishReason.STOP
    assert b.worker.workers[1].steps == 0
    b.check_nothing_leaks()


def test_a_stream_begins_with_the_first_token(strict, null_tokens):
    b = strict()
    sequence = b.sequence(range(7), max_new_tokens=4, stream=True)
    b.offer(sequence)
    b.run()
    assert [token for delta in b.deltas for token in delta.tokens] == null_tokens(7, 4)


def test_prompts_that_share_a_beginning_go_to_one_worker_others_to_the_idle_one(strict):
    b = strict(prefill_workers=2, decode_workers=2, max_step_tokens=64)
    alike = [b.sequence([*range(16), 100 + i], max_new_tokens=2) for i in range(2)]
    other = b.sequence(range(200, 220), max_new_tokens=2)
    b.offer(alike[0], other, alike[1])
    (first, third) = b.waiting.take_granted()
    assert (first, third) == (alike[0], other)  # the second waits for the first one's KV
    assert {first.kv.worker, third.kv.worker} == {0, 1}
    assert {first.kv.handover.book.worker, third.kv.handover.book.worker} == {0, 1}
    b.worker.submit_prefill([first, third])
    b.run()
    assert len(b.finished) == 3
    assert alike[1].prefix_hit_tokens == 16
    b.check_nothing_leaks()


def test_a_decode_pool_that_is_full_keeps_prompts_waiting(strict, null_tokens):
    b = strict(blocks=12)
    sequences = [b.sequence([i, *range(14)], max_new_tokens=20) for i in range(5)]
    b.offer(*sequences)
    b.run()
    for sequence in sequences:
        assert sequence.choices[0].output_tokens == null_tokens(15, 20)
    assert b.worker.preemptions > 0
    b.check_nothing_leaks()


def test_idle_for_long_then_a_request(strict, null_tokens):
    now = [0.0]
    b = strict(clock=lambda: now[0])
    for hour in range(3):
        now[0] = 3600.0 * hour
        sequence = b.sequence(range(6), max_new_tokens=3, interactive=True)
        sequence.request.arrival = now[0]
        b.offer(sequence)
        b.run()
        assert sequence.choices[0].output_tokens == null_tokens(6, 3)
    b.check_nothing_leaks()


def test_the_worker_that_decodes_fails_and_everybody_gets_one_end(strict):
    b = strict(max_step_tokens=8)
    sequences = [b.sequence([i] * 12, max_new_tokens=9) for i in range(4)]
    b.offer(*sequences)
    b.worker.submit_prefill(b.waiting.take_granted())
    for _ in range(3):
        b.step()
    for worker in b.worker.workers:
        worker.abandon(RuntimeError("the test says so"))
    assert sorted(map(id, b.finished)) == sorted(map(id, sequences))
    assert all("the test says so" in sequence.error for sequence in sequences)


def test_a_cancel_reaches_the_workers_that_live(strict):
    b = strict(decode_workers=2)
    sequences = [b.sequence([i] * 6, max_new_tokens=50) for i in range(2)]
    b.offer(*sequences)
    b.worker.submit_prefill(b.waiting.take_granted())
    for _ in range(4):
        b.step()
    b.worker.workers[1].abandon(RuntimeError("the test says so"))
    b.worker.cancel([sequence.request for sequence in sequences])
    b.worker.workers[2].step()
    assert {sequence.choices[0].finish_reason for sequence in sequences} == {FinishReason.ERROR, FinishReason.CANCELLED}
    b.run()
    b.check_nothing_leaks()


def test_dropped_on_its_way_to_decode_it_settles_its_tenants_account(strict):
    b = strict(policy="fair_share")
    sequence = b.sequence(range(6), tenant="a")
    b.offer(sequence)
    b.worker.submit_prefill(b.waiting.take_granted())
    prefill, decode = b.worker.workers
    while not decode._inbox:
        prefill.step()
    b.reclaim(sequence)
    b.run()
    assert not any(account.promised for account in b.waiting._waiting._accounts.values())
    b.check_nothing_leaks()


def test_a_block_that_a_step_copies_from_is_kept_until_the_step_has_been_read(strict):
    b = strict({1})
    b.offer(b.sequence(range(10), max_new_tokens=2))
    b.run()
    second = b.sequence([*range(10), 50, 51], max_new_tokens=9)  # decode computes it, and finds 10 tokens cached
    b.offer(second)
    b.worker.submit_prefill(b.waiting.take_granted())
    prefill, decode = b.worker.workers
    while not decode._inbox:
        prefill.step()
    assert decode.launch()
    ((plan, _),) = decode._unread
    ((source, _),) = plan.copies
    decode.launch()
    owners = decode._kv._pool.owners.counts
    assert owners[source] == 1
    decode.read_oldest()
    assert owners[source] == 0
    b.run()
    b.check_nothing_leaks()
