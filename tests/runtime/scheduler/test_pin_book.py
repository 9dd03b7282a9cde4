"""PinBook: what may be pinned leaves room for everybody who was let in, and everybody who is let in has room."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sageLLM.errors import RequestError


def refuse(b, *sequence, **more):
    with pytest.raises(RequestError) as refused:
        b.offer(b.sequence(*sequence, **more))
    return str(refused.value)


def test_a_pinned_prompt_stays_whatever_else_runs(bench):
    b = bench(blocks=16)
    b.offer(b.sequence(range(10), 1, pin=True))
    b.run()
    assert b.kv.num_pinned == 3
    for n in range(20):
        b.offer(b.sequence([100 + n] * 30, 8))
        b.run()
    again = b.sequence([*range(10), 50])
    b.offer(again)
    b.run()
    assert again.prefix_hit_tokens == 10
    b.check_nothing_leaks()


def test_more_than_max_pinned_ratio_is_refused_and_says_what_to_do(bench):
    b = bench(blocks=16)
    b.offer(b.sequence(range(20), 1, pin=True))
    told = refuse(b, range(50, 65), 1, pin=True)
    assert "4 KV blocks to pin and 5 pinned ones are more than the 8 that may be" in told
    assert "raise kv_cache.max_pinned_ratio" in told
    b.run()
    b.pins.end([sequence.request for sequence in b.finished])
    refuse(b, range(50, 65), 1, pin=True)
    b.offer(b.sequence(range(50, 62), 1, pin=True))


def test_a_pin_that_never_came_about_is_free_again(bench):
    b = bench(blocks=16)
    gone = b.sequence(range(30), 1, pin=True)
    b.offer(gone)
    gone.request.cancelled = True
    assert b.waiting.take_ended() == [gone]
    b.pins.end([gone.request])
    b.offer(b.sequence(range(40, 70), 1, pin=True))


def test_what_would_not_fit_beside_pins_is_refused_and_the_other_way_round(bench):
    b = bench(blocks=16)
    large = b.sequence(range(40), 10)
    b.offer(large)
    assert "would leave too few to a request under way that may need 13 of 16" in refuse(b, range(16), 1, pin=True)
    b.offer(b.sequence(range(12), 1, pin=True))
    b.run()
    b.pins.end([sequence.request for sequence in b.finished])
    assert "needs 14 KV blocks, 3 of the pool's 16 are pinned" in refuse(b, range(40, 80), 16)
    b.offer(b.sequence(range(80, 120), 12))
    b.run()


def test_without_a_cache_or_a_stage_that_commits_nothing_is_pinned(bench):
    b = bench()
    b.pins.served = False
    assert "found pin, but the pipeline has no kv_commit" in refuse(b, [1], pin=True)
    both = b.sequence([1], pin=True)
    both.request.unpin = True
    with pytest.raises(RequestError, match="found pin and unpin"):
        b.offer(both)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
@example(seed=1246152)  # preempted, a row goes on beside its own pin's last block
def test_whoever_is_let_in_is_computed(bench, seed):
    """Random pins, unpins and large requests, of a pool that is as small as can be: none waits for ever."""
    chosen = random.Random(seed)
    b = bench(
        blocks=chosen.randint(8, 24), max_batch_size=4, max_step_tokens=16, policy=chosen.choice(["fcfs", "fair_share"])
    )
    open_requests, let_in, pinned = {}, 0, []
    for _ in range(30):
        shared = chosen.randint(0, 20)
        prompt = [*range(shared), *(chosen.randint(50, 53) for _ in range(chosen.randint(1, 30)))]
        sequence = b.sequence(prompt, chosen.randint(1, 30), pin=chosen.random() < 0.4)
        try:
            b.offer(sequence)
        except RequestError:
            continue
        let_in += 1
        open_requests[id(sequence)] = sequence
        if chosen.random() < 0.3:
            b.run(limit=3000)
            ended = [open_requests.pop(id(sequence)) for sequence in b.finished if id(sequence) in open_requests]
            b.pins.end([sequence.request for sequence in ended])
            pinned += [sequence for sequence in ended if sequence.request.pin]
        if pinned and chosen.random() < 0.3:
            b.kv.unpin(pinned.pop(chosen.randrange(len(pinned))).prompt_tokens, ("", ""))
    b.run(limit=3000)
    assert len(b.finished) == let_in
    assert b.kv.num_pinned <= b.kv.num_blocks // 2
    b.check_nothing_leaks()
