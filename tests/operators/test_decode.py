"""decode: prefilled sequences in; each comes back ended, after its deltas if its request streams."""

from __future__ import annotations

import pytest

from sageLLM.config import SageLLMConfig
from sageLLM.engine import standard_pipeline
from sageLLM.errors import PipelineError
from sageLLM.graph import build_pipeline
from sageLLM.operators.decode import Decode
from sageLLM.operators.prefill import Prefill
from sageLLM.operators.schedule import Schedule
from sageLLM.records import TokenDelta


def null_tokens(prompt_length, count):
    return [97 + (prompt_length + k) % 26 for k in range(count)]


def run_decode(on_loop, engine, body, **config):
    """`body(prefilled, decode)`: `await prefilled(*sequences)` makes what decode takes."""

    async def main():
        async with (
            engine.services.running(),
            engine.stage(Schedule) as schedule,
            engine.stage(Prefill) as prefill,
            engine.stage(Decode, **config) as decode,
        ):

            async def prefilled(*sequences):
                return await prefill.put(*await schedule.put(*sequences))

            await body(prefilled, decode)
            for stage in (schedule, prefill, decode):
                stage.inlet.close()
            await decode.settled()

    on_loop(main)
    engine.check_nothing_leaks()


def test_each_comes_back_ended_with_its_tokens_and_its_lease_is_free(on_loop, null_engine):
    engine = null_engine()
    sequences = [engine.sequence([1] * (2 + n), max_new_tokens=1 + n) for n in range(6)]

    async def body(prefilled, decode):
        ended = await decode.put(*await prefilled(*sequences))
        assert ended == sequences  # the shortest output ends first
        for n, sequence in enumerate(sequences):
            (choice,) = sequence.choices
            assert choice.output_tokens == null_tokens(2 + n, 1 + n)
            assert choice.finish_reason == "length"
            assert sequence.ended
            assert sequence.kv is None
            assert sequence.timings.first_token <= sequence.timings.last_token <= sequence.timings.finished
        assert engine.services.leases.free_slots == engine.services.leases.num_slots

    run_decode(on_loop, engine, body)


@pytest.mark.parametrize(("stop", "count"), [({"stop_token_ids": (102,)}, 4), ({"stop": ("ef",)}, 4)])
def test_stops_end_a_sequence(on_loop, null_engine, stop, count):
    engine = null_engine()
    sequence = engine.sequence([1, 2], max_new_tokens=20, **stop)  # the null model says cdefgh...

    async def body(prefilled, decode):
        await decode.put(*await prefilled(sequence))
        (choice,) = sequence.choices
        assert choice.output_tokens == null_tokens(2, count)
        assert choice.finish_reason == "stop"
        assert choice.stop_matched == next(iter(stop.values()))[0]

    run_decode(on_loop, engine, body)


def test_all_choices_have_ended_when_it_comes_back(on_loop, null_engine):
    engine = null_engine()
    sequence = engine.sequence([1, 2, 3, 4, 5], max_new_tokens=3, n=4)

    async def body(prefilled, decode):
        assert await decode.put(*await prefilled(sequence)) == [sequence]
        assert [choice.index for choice in sequence.choices] == [0, 1, 2, 3]
        assert [choice.output_tokens for choice in sequence.choices] == [null_tokens(5, 3)] * 4

    run_decode(on_loop, engine, body)


def test_a_streaming_request_gets_a_delta_for_each_step_and_choice_before_its_end(on_loop, null_engine):
    engine = null_engine()
    streaming = engine.sequence([1, 2, 3], max_new_tokens=4, n=2, stream=True)
    other = engine.sequence([1, 2, 3], max_new_tokens=4)

    async def body(prefilled, decode):
        await decode.put(*await prefilled(streaming, other))
        deltas = [record for record in decode.sent if isinstance(record, TokenDelta)]
        assert {delta.sequence for delta in deltas} == {streaming}
        for index in (0, 1):
            tokens = [delta.tokens for delta in deltas if delta.choice == index]
            assert [token for step in tokens for token in step] == streaming.choices[index].output_tokens
            assert len(tokens) >= 3  # as they come, and not all at the end
        assert decode.sent.index(streaming) > max(decode.sent.index(delta) for delta in deltas)

    run_decode(on_loop, engine, body)


def test_ended_sequences_pass_through_untouched(on_loop, null_engine):
    engine = null_engine()
    sequence = engine.sequence([1, 2])

    async def body(prefilled, decode):
        await decode.put(*await prefilled(sequence))
        tokens = list(sequence.choices[0].output_tokens)
        assert await decode.put(sequence) == [sequence]
        assert sequence.choices[0].output_tokens == tokens

    run_decode(on_loop, engine, body)


def test_cancelled_it_ends_within_a_step_and_keeps_what_it_has(on_loop, null_engine):
    engine = null_engine(kv_cache={"max_tokens": 65536})
    sequence = engine.sequence([1, 2], max_new_tokens=10_000, stream=True, interactive=True)

    async def body(prefilled, decode):
        await decode.put(*await prefilled(sequence))
        assert not sequence.ended
        engine.services.cancel([sequence.request])
        await decode.settled()
        assert sequence.ended
        (choice,) = sequence.choices
        assert choice.finish_reason == "cancelled"
        assert choice.output_tokens == null_tokens(2, len(choice.output_tokens))

    run_decode(on_loop, engine, body)


def test_past_its_deadline_it_ends_with_timeout(on_loop, null_engine):
    engine = null_engine(scheduler={"request_timeout_s": 0.05}, kv_cache={"max_tokens": 65536})
    call = engine.sequence([1, 2], max_new_tokens=30_000, interactive=True)
    line = engine.sequence([3, 4], max_new_tokens=5)

    async def body(prefilled, decode):
        await decode.put(*await prefilled(call, line))
        await decode.until(lambda: call.ended)
        assert call.choices[0].finish_reason == "timeout"
        assert line.choices[0].finish_reason == "length"

    run_decode(on_loop, engine, body)


def test_a_step_that_fails_rejects_its_sequences(on_loop, null_engine, monkeypatch):
    engine = null_engine()
    sequence = engine.sequence([1, 2], max_new_tokens=50)

    async def body(prefilled, decode):
        computed = await prefilled(sequence)

        def fail(plan):
            raise RuntimeError("the device stumbled")

        monkeypatch.setattr(engine.services.executors[0], "launch", fail)
        assert await decode.put(*computed) == []
        assert decode.errors == ["RuntimeError: the device stumbled"]
        assert sequence.choices[0].output_tokens  # what it had

    run_decode(on_loop, engine, body)


def test_memory_that_runs_out_costs_time_and_no_tokens(on_loop, null_engine):
    engine = null_engine(kv_cache={"max_tokens": 48, "block_size": 4})  # 12 blocks; each needs up to 8
    sequences = [engine.sequence([n] * 5, max_new_tokens=26) for n in range(4)]

    async def body(prefilled, decode):
        await decode.put(*await prefilled(*sequences))
        await decode.until(lambda: all(sequence.ended for sequence in sequences))
        assert engine.services.worker.preemptions > 0
        assert all(sequence.choices[0].output_tokens == null_tokens(5, 26) for sequence in sequences)

    run_decode(on_loop, engine, body)


def test_what_was_reclaimed_on_the_way_comes_back_cancelled(on_loop, null_engine):
    engine = null_engine()
    sequence = engine.sequence([1, 2])

    async def body(prefilled, decode):
        computed = await prefilled(sequence)
        engine.services.release([sequence.request])  # its request was settled elsewhere
        assert await decode.put(*computed) == [sequence]
        assert [choice.finish_reason for choice in sequence.choices] == ["cancelled"]

    run_decode(on_loop, engine, body)


@pytest.mark.parametrize(("config", "widest"), [({}, 3), ({"max_batch": 2}, 2), ({"max_batch": 6}, 6)])
def test_at_most_max_batch_sequences_a_step(on_loop, null_engine, plans_of, config, widest):
    engine = null_engine(scheduler={"max_decode_batch": 3, "max_batch_size": 6})
    sequences = [engine.sequence([n] * 3, max_new_tokens=5) for n in range(6)]
    plans = plans_of(engine)

    async def body(prefilled, decode):
        await decode.put(*await prefilled(*sequences))
        await decode.until(lambda: all(sequence.ended for sequence in sequences))
        assert max(len(plan.decode_slots) for plan in plans) == widest

    run_decode(on_loop, engine, body, **config)


@pytest.mark.parametrize("stage", ["decode", "prefill"])
def test_max_batch_beyond_what_runs_at_once_is_refused(stage):
    pipeline = standard_pipeline(SageLLMConfig())
    assert build_pipeline(pipeline, [f"operators.{stage}.max_batch=64"]).nodes[stage].config.max_batch == 64
    with pytest.raises(PipelineError) as raised:
        build_pipeline(pipeline, [f"operators.{stage}.max_batch=65"])
    assert raised.value.problems == [
        f"--set operators.{stage}.max_batch=65: operator {stage!r}, field 'max_batch': found 65, but 64 run at once; "
        "write at most that, or raise engine.scheduler.max_batch_size"
    ]
