"""schedule: sequences in, the same sequences out when there is room for them on the worker."""

from __future__ import annotations

import pytest

from sageLLM.config import SchedulerPolicy
from sageLLM.operators.schedule import Schedule
from sageLLM.records import NO_LIMIT, FinishReason
from sageLLM.runtime.scheduler.lease import Lease, PrefixHint


def test_each_sequence_passes_with_a_lease_in_order_of_arrival(on_loop, null_engine):
    engine = null_engine()
    sequences = [engine.sequence([n] * 5, n=1 + n % 2) for n in range(4)]

    async def main():
        async with engine.stage(Schedule) as schedule:
            assert await schedule.put(*sequences) == sequences
        for sequence in sequences:
            assert isinstance(sequence.kv, Lease)
            assert len(sequence.kv.slots) == sequence.sampling.n  # a slot for each choice
            assert len(sequence.kv.blocks) == 2  # 5 tokens in blocks of 4
            assert sequence.timings.queued <= sequence.timings.scheduled
        engine.services.release([sequence.request for sequence in sequences])

    on_loop(main)
    engine.check_nothing_leaks()


@pytest.mark.parametrize(
    "scarce",
    [
        {"scheduler": {"max_batch_size": 3}},  # slots
        {"kv_cache": {"max_tokens": 24, "block_size": 4}},  # blocks: two for each prompt
    ],
)
def test_without_room_it_waits_and_when_a_lease_returns_goes_on(on_loop, null_engine, scarce):
    engine = null_engine(**scarce)
    sequences = [engine.sequence([n] * 5) for n in range(5)]

    async def main():
        async with engine.stage(Schedule) as schedule:
            assert await schedule.put(*sequences) == sequences[:3]
            engine.services.release([sequences[1].request])  # ended, whatever became of it
            await schedule.settled()
            assert schedule.sent == sequences[:4]
            engine.services.release([sequence.request for sequence in sequences[:4]])
            await schedule.settled()
            assert schedule.sent == sequences
            engine.services.release([sequences[4].request])

    on_loop(main)
    engine.check_nothing_leaks()


@pytest.mark.parametrize(("inner", "n", "most"), [({}, 1, 24 - 5), ({}, 2, 20 - 5), ({"max_tokens": 4}, 1, None)])
def test_as_many_tokens_as_fit_are_those_for_which_the_pool_has_room(on_loop, null_engine, inner, n, most):
    engine = null_engine(kv_cache={"max_tokens": 24, "block_size": 4} | inner)
    sequence = engine.sequence([1] * 5, max_new_tokens=NO_LIMIT, min_tokens=30, n=n)

    async def main():
        async with engine.stage(Schedule) as schedule:
            await schedule.put(sequence)
            if most is None:
                assert "prompt of 5 tokens + max_new_tokens 1 needs 2 KV blocks, the pool has 1" in schedule.errors[0]
            else:
                assert schedule.sent == [sequence]
                assert (sequence.sampling.max_new_tokens, sequence.sampling.min_tokens) == (most, most)
        engine.services.release([sequence.request])

    on_loop(main)
    engine.check_nothing_leaks()


def test_backpressure_when_many_wait_the_inputs_are_not_read(on_loop, null_engine):
    engine = null_engine(scheduler={"max_batch_size": 2})
    sequences = [engine.sequence([n] * 3) for n in range(30)]

    async def main():
        async with engine.stage(Schedule, max_waiting=5) as schedule:
            for sequence in sequences:
                await schedule.put(sequence)
            assert (len(schedule.sent), schedule.taken) == (2, 2 + 5)
            for ended in range(30):
                engine.services.release([sequences[ended].request])
                await schedule.settled()
                assert schedule.taken <= len(schedule.sent) + 5
            assert schedule.sent == sequences

    on_loop(main)
    engine.check_nothing_leaks()


@pytest.mark.parametrize(
    ("bound", "most_waiting"),
    [
        ({"max_waiting_tokens": 10}, 2),  # prompts of 5 tokens
        ({"max_waiting_tokens": 11}, 3),
        ({"max_waiting_blocks": 8}, 4),  # in blocks of 4
        ({"max_waiting_blocks": 7, "max_waiting_tokens": 1000}, 4),
        ({"max_waiting_blocks": 7, "max_waiting": 3}, 3),
    ],
)
def test_backpressure_by_the_tokens_and_by_the_kv_blocks_that_wait(on_loop, null_engine, bound, most_waiting):
    engine = null_engine(scheduler={"max_batch_size": 1})
    sequences = [engine.sequence([n] * 5, interactive=n == 3) for n in range(12)]
    sequences[7].request.cancelled = True

    async def main():
        async with engine.stage(Schedule, **bound) as schedule:
            for sequence in sequences:
                await schedule.put(sequence)
            assert (len(schedule.sent), schedule.taken) == (1, 1 + most_waiting)
            for sequence in sequences:
                engine.services.release([sequence.request])
                await schedule.settled()
                assert schedule.taken <= len(schedule.sent) + most_waiting
            assert set(schedule.sent) == set(sequences)
            waiting = engine.services.waiting
            assert (waiting.tokens, waiting.blocks, waiting.next_timeout()) == (0, 0, float("inf"))

    on_loop(main)
    engine.check_nothing_leaks()


def test_what_can_never_fit_is_rejected_and_the_others_pass(on_loop, null_engine):
    engine = null_engine(scheduler={"max_batch_size": 4})
    good = engine.sequence([1, 2, 3])
    bad = [
        (engine.sequence([1], n=5), "n=5 is more than scheduler.max_batch_size=4"),
        (engine.sequence([1] * 200, max_new_tokens=60), "needs 65 KV blocks, the pool has 64"),
        (engine.sequence([1, 2], top_p=3.0), "top_p"),  # if no tokenize stage has looked at it
    ]

    async def main():
        async with engine.stage(Schedule) as schedule:
            assert await schedule.put(*(sequence for sequence, _ in bad), good) == [good]
        assert len(schedule.errors) == len(bad)
        for letter, (sequence, text) in zip(schedule.outlet.letters, bad, strict=True):
            assert text in letter.error
            assert letter.request is sequence.request
        engine.services.release([good.request])

    on_loop(main)
    engine.check_nothing_leaks()


def test_a_large_sequence_is_not_overtaken_for_ever(on_loop, null_engine):
    engine = null_engine(scheduler={"max_batch_size": 4})
    running = engine.sequence([1])
    large, small = engine.sequence([2], n=4), engine.sequence([3])

    async def main():
        async with engine.stage(Schedule) as schedule:
            assert await schedule.put(running, large, small) == [running]  # there would be a slot for `small`
            engine.services.release([running.request])
            await schedule.settled()
            assert schedule.sent == [running, large]
            engine.services.release([large.request])
            await schedule.settled()
            assert schedule.sent == [running, large, small]
            engine.services.release([small.request])

    on_loop(main)
    engine.check_nothing_leaks()


def test_a_prefix_that_is_being_computed_is_waited_for(on_loop, null_engine):
    engine = null_engine()
    shared = list(range(8))
    first, second, other = (engine.sequence(p) for p in ([*shared, 1, 1], [*shared, 2, 2], [9] * 10))
    for sequence in (first, second, other):
        sequence.kv = PrefixHint(0)  # as kv_lookup leaves it

    async def main():
        async with engine.stage(Schedule) as schedule:
            assert await schedule.put(first, second, other) == [first, other]
            engine.services.leases.prefix_computed(first, first.kv)  # as kv_commit does
            schedule.operator._wake()
            await schedule.settled()
            assert schedule.sent == [first, other, second]
        engine.services.release([first.request, second.request, other.request])

    on_loop(main)
    engine.check_nothing_leaks()


@pytest.mark.parametrize("interactive", [False, True])
def test_cancelled_while_it_waits_it_passes_ended(on_loop, null_engine, interactive):
    engine = null_engine(scheduler={"max_batch_size": 1})
    running, waiting = engine.sequence([1]), engine.sequence([2], n=1, interactive=interactive)

    async def main():
        async with engine.services.running(), engine.stage(Schedule) as schedule:
            assert await schedule.put(running, waiting) == [running]
            engine.services.cancel([waiting.request])
            await schedule.settled()
            assert schedule.sent == [running, waiting]
        assert waiting.ended
        assert [choice.finish_reason for choice in waiting.choices] == [FinishReason.CANCELLED]
        engine.services.release([running.request])

    on_loop(main)
    engine.check_nothing_leaks()


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ("queue_timeout_s", FinishReason.QUEUE_TIMEOUT),
        ("first_token_timeout_s", FinishReason.FIRST_TOKEN_TIMEOUT),
        ("request_timeout_s", FinishReason.TIMEOUT),
    ],
)
def test_what_somebody_waits_for_leaves_at_its_timeout_and_lines_of_a_file_do_not(on_loop, null_engine, limit, reason):
    engine = null_engine(scheduler={"max_batch_size": 1, limit: 0.01})
    running, line, call = engine.sequence([1]), engine.sequence([2]), engine.sequence([3], interactive=True)

    async def main():
        async with engine.stage(Schedule) as schedule:
            await schedule.put(running, line, call)
            await schedule.until(lambda: call.ended)
            await schedule.settled()
            assert set(schedule.sent) == {running, call}  # in this order, unless its time was up before it came
            assert call.choices[0].finish_reason is reason
            assert not line.ended
            engine.services.release([running.request])
            await schedule.settled()
            engine.services.release([line.request])

    on_loop(main)
    engine.check_nothing_leaks()


def test_it_ends_when_its_inputs_have_ended_and_nobody_waits(on_loop, null_engine):
    engine = null_engine(scheduler={"max_batch_size": 1})
    sequences = [engine.sequence([n]) for n in range(3)]

    async def main():
        async with engine.stage(Schedule) as schedule:
            await schedule.put(*sequences)
            schedule.inlet.close()
            for sequence in sequences:
                await schedule.settled()
                engine.services.release([sequence.request])
        assert schedule.sent == sequences

    on_loop(main)
    engine.check_nothing_leaks()


@pytest.mark.parametrize(("field", "value", "policy"), [("priority", 3, "priority"), ("deadline_ms", 20.0, "deadline")])
def test_what_the_policy_would_ignore_is_refused_and_what_it_heeds_is_not(on_loop, null_engine, field, value, policy):
    async def main():
        for chosen in SchedulerPolicy:
            engine = null_engine(scheduler={"policy": chosen})
            special, plain = engine.sequence([1]), engine.sequence([2])
            setattr(special.request, field, value)
            async with engine.stage(Schedule) as schedule:
                passed = await schedule.put(special, plain)
                if chosen == policy:
                    assert passed == [special, plain]
                else:
                    assert passed == [plain]
                    assert schedule.errors == [
                        f"found {field} {value}: leave it out, or set scheduler.policy: {policy}"
                    ]
                engine.services.release([special.request, plain.request])
            engine.check_nothing_leaks()

    on_loop(main)


def test_the_policy_decides_who_is_next(on_loop, null_engine):
    engine = null_engine(scheduler={"max_batch_size": 1, "policy": "PRIORITY"})
    running, low, high = engine.sequence([1]), engine.sequence([2]), engine.sequence([3])
    high.request.priority = 1

    async def main():
        async with engine.stage(Schedule) as schedule:
            assert await schedule.put(running) == [running]
            await schedule.put(low, high)
            for sequence in (running, high, low):
                engine.services.release([sequence.request])
                await schedule.settled()
            assert schedule.sent == [running, high, low]

    on_loop(main)
    engine.check_nothing_leaks()
