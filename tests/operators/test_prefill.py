"""prefill: leased sequences in; each comes back when its prompt is computed and its first token chosen."""

from __future__ import annotations

import pytest

from sageLLM.errors import EngineClosedError
from sageLLM.operators.prefill import Prefill
from sageLLM.operators.schedule import Schedule


def run_prefill(on_loop, engine, body, **config):
    """`body(schedule, prefill)` with both stages and the worker running; what is left is released afterwards."""

    async def main():
        async with (
            engine.services.running(),
            engine.stage(Schedule) as schedule,
            engine.stage(Prefill, **config) as prefill,
        ):
            await body(schedule, prefill)
            schedule.inlet.close()
            engine.services.release([sequence.request for sequence in schedule.sent])
            await prefill.settled()

    on_loop(main)
    engine.check_nothing_leaks()


def test_every_sequence_comes_back_with_its_prompt_computed(on_loop, null_engine):
    engine = null_engine()
    sequences = [engine.sequence([n] * (3 + n)) for n in range(6)]

    async def body(schedule, prefill):
        back = await prefill.put(*await schedule.put(*sequences))
        assert set(back) == set(sequences)
        for sequence in sequences:
            assert not sequence.ended
            assert sequence.timings.scheduled <= sequence.timings.first_token
            assert len(sequence.kv.blocks) == -(-len(sequence.prompt_tokens) // 4)
            assert engine.services.worker.num_running == 6  # each stays on the worker, and keeps its lease

    run_prefill(on_loop, engine, body)


def test_a_long_prompt_is_computed_in_chunks_beside_others(on_loop, null_engine):
    engine = null_engine(scheduler={"max_step_tokens": 8, "max_prefill_batch": 2})
    long, short = engine.sequence([1] * 30), engine.sequence([2] * 3)

    async def body(schedule, prefill):
        steps = engine.services.worker.steps
        assert set(await prefill.put(*await schedule.put(long, short))) == {long, short}
        assert engine.services.worker.steps - steps == 5  # 33 tokens in steps of 8

    run_prefill(on_loop, engine, body)


@pytest.mark.parametrize(("config", "widest"), [({}, 3), ({"max_batch": 2}, 2), ({"max_batch": 6}, 6)])
def test_at_most_max_batch_prompts_a_step(on_loop, null_engine, plans_of, config, widest):
    engine = null_engine(scheduler={"max_prefill_batch": 3, "max_batch_size": 6})
    sequences = [engine.sequence([n] * 4) for n in range(6)]
    plans = plans_of(engine)

    async def body(schedule, prefill):
        assert set(await prefill.put(*await schedule.put(*sequences))) == set(sequences)
        assert max(len(plan.chunks) for plan in plans) == widest

    run_prefill(on_loop, engine, body, **config)


def test_ended_sequences_pass_through_untouched(on_loop, null_engine):
    engine = null_engine(scheduler={"max_batch_size": 1})
    running, cancelled = engine.sequence([1]), engine.sequence([2], interactive=True)

    async def body(schedule, prefill):
        await prefill.put(*await schedule.put(running, cancelled))
        engine.services.cancel([cancelled.request])
        await schedule.settled()
        assert await prefill.put(schedule.sent[-1]) == [cancelled]
        assert engine.services.worker.num_running == 1

    run_prefill(on_loop, engine, body)


def test_cancelled_on_the_way_it_comes_back_ended_and_frees_its_lease(on_loop, null_engine):
    engine = null_engine()
    sequence = engine.sequence([1] * 9, interactive=True)

    async def body(schedule, prefill):
        await schedule.put(sequence)
        engine.services.cancel([sequence.request])
        assert await prefill.put(sequence) == [sequence]
        assert [choice.finish_reason for choice in sequence.choices] == ["cancelled"]
        assert engine.services.leases.free_slots == engine.services.leases.num_slots

    run_prefill(on_loop, engine, body)


def test_a_step_that_fails_rejects_its_sequences_and_the_next_ones_pass(on_loop, null_engine, monkeypatch):
    engine = null_engine()
    bad, good = engine.sequence([1] * 5), engine.sequence([2] * 5)
    executor = engine.services.executors[0]
    launch = executor.launch

    def launch_once_badly(plan):
        monkeypatch.setattr(executor, "launch", launch)
        raise RuntimeError("the device stumbled")

    monkeypatch.setattr(executor, "launch", launch_once_badly)

    async def body(schedule, prefill):
        assert await prefill.put(*await schedule.put(bad)) == []
        assert prefill.errors == ["RuntimeError: the device stumbled"]
        assert prefill.outlet.letters[0].request is bad.request
        assert engine.services.leases.free_slots == engine.services.leases.num_slots
        assert await prefill.put(*await schedule.put(good)) == [good]

    run_prefill(on_loop, engine, body)


def test_it_ends_when_its_inputs_have_ended_and_nothing_is_inside(on_loop, null_engine):
    engine = null_engine()
    sequence = engine.sequence([1] * 20)

    async def body(schedule, prefill):
        leased = await schedule.put(sequence)
        await prefill.inlet.send(leased)
        prefill.inlet.close()

    run_prefill(on_loop, engine, body)


def test_a_worker_that_failed_takes_nothing(on_loop, null_engine):
    engine = null_engine()
    sequence = engine.sequence([1, 2])

    async def main():
        async with engine.stage(Schedule) as schedule:
            engine.services.worker.abandon(RuntimeError("no device"))
            with pytest.raises(BaseExceptionGroup) as raised:
                async with engine.stage(Prefill) as prefill:
                    await prefill.put(*await schedule.put(sequence))
            assert raised.group_contains(EngineClosedError, match="no device")
        engine.services.release([sequence.request])

    on_loop(main)
    engine.check_nothing_leaks()
