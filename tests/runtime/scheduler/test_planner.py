"""The planner: token budget, chunks, order, and what a step holds. No model, no device."""

from __future__ import annotations

import pytest


@pytest.fixture
def recorded(bench, recorder_of):
    from sageLLM.runtime.worker.executor import NullExecutor

    def make(**options):
        recorder = recorder_of(NullExecutor(options.get("max_batch_size", 8)))
        return bench(executor=recorder, launch_ahead=False, **options), recorder.plans

    return make


def test_a_long_prompt_is_chunked_to_the_budget(recorded):
    b, plans = recorded(max_step_tokens=8)
    b.offer(b.sequence(range(20), max_new_tokens=2))
    b.run()
    assert [[(c.start, len(c.tokens)) for c in plan.chunks] for plan in plans] == [[(0, 8)], [(8, 8)], [(16, 4)], []]
    assert [len(plan.sample_slots) for plan in plans] == [0, 0, 1, 1]


def test_decoding_rows_come_first_and_chunks_fill_the_rest(recorded):
    b, plans = recorded(max_step_tokens=6, commit=False)
    b.offer(b.sequence([1, 2], max_new_tokens=9), b.sequence(range(10, 30), max_new_tokens=2))
    b.run()
    mixed = [plan for plan in plans if len(plan.decode_slots) and plan.chunks]
    assert mixed
    assert all(plan.num_tokens <= 6 for plan in plans)


def test_at_most_max_prefill_batch_prompts_a_step(recorded):
    b, plans = recorded(max_prefill_batch=2, max_step_tokens=64)
    b.offer(*(b.sequence([i] * 4, max_new_tokens=1) for i in range(5)))
    b.run()
    assert [len(plan.chunks) for plan in plans if plan.chunks] == [2, 2, 1]


def test_no_row_starves_when_decode_is_narrower_than_the_batch(recorded):
    b, plans = recorded(max_decode_batch=2, max_prefill_batch=8)
    b.offer(*(b.sequence([i] * 3, max_new_tokens=5) for i in range(6)))
    done = b.run()
    assert len(done) == 6
    assert max(len(plan.decode_slots) for plan in plans) == 2


def test_no_step_is_longer_than_its_budget_when_more_rows_decode_than_that(recorded):
    b, plans = recorded(max_step_tokens=4)
    sequence = b.sequence([1] * 3, max_new_tokens=9, n=8)
    b.offer(sequence)
    b.run()
    assert [len(choice.output_tokens) for choice in sequence.choices] == [9] * 8
    assert max(plan.num_tokens for plan in plans) == 4


def test_positions_and_tables_match_the_row(recorded):
    b, plans = recorded(block_size=4)
    b.offer(b.sequence(range(7), max_new_tokens=4))
    b.run()
    assert [plan.decode_positions.tolist() for plan in plans] == [[], [7], [8], [9]]
    assert [plan.block_tables.shape for plan in plans] == [(1, 2), (1, 2), (1, 3), (1, 3)]


def test_the_newest_row_is_preempted_and_resumes_in_its_place(recorded):
    b, plans = recorded(blocks=6, block_size=4)
    old, new = b.sequence([1] * 8, max_new_tokens=12), b.sequence([2] * 8, max_new_tokens=12)
    b.offer(old, new)
    done = b.run()
    assert done == [old, new]
    assert b.worker.preemptions == 1
    recomputed = [chunk for plan in plans for chunk in plan.chunks if chunk.tokens[:1] == [2] and len(chunk.tokens) > 8]
    assert len(recomputed) == 1  # prompt and what it had said, in one go
    b.check_nothing_leaks()
