"""kv_commit: between prefill and decode; from here on others share the prompt's KV, and later the output's."""

from __future__ import annotations

import pytest

from sageLLM.operators.decode import Decode
from sageLLM.operators.kv_commit import KVCommit
from sageLLM.operators.kv_lookup import KVLookup
from sageLLM.operators.prefill import Prefill
from sageLLM.operators.schedule import Schedule

PROMPT = list(range(10))


class Line:
    """kv_lookup to decode, each stage fed by hand."""

    def __init__(self, lookup, schedule, prefill, commit, decode):
        self.lookup, self.schedule, self.prefill, self.commit, self.decode = lookup, schedule, prefill, commit, decode

    async def compute_prompt(self, *sequences):
        return await self.prefill.put(*await self.schedule.put(*await self.lookup.put(*sequences)))


def run_line(on_loop, engine, body, **commit):
    async def main():
        async with (
            engine.services.running(),
            engine.stage(KVLookup) as lookup,
            engine.stage(Schedule) as schedule,
            engine.stage(Prefill) as prefill,
            engine.stage(KVCommit, **commit) as committer,
            engine.stage(Decode) as decode,
        ):
            await body(Line(lookup, schedule, prefill, committer, decode))
            schedule.inlet.close()
            engine.services.release([sequence.request for sequence in schedule.sent])
            await decode.settled()

    on_loop(main)
    engine.check_nothing_leaks()


def test_every_sequence_goes_on_in_order(on_loop, null_engine):
    engine = null_engine()

    async def body(line):
        computed = await line.compute_prompt(*(engine.sequence([n] * 5) for n in range(4)))
        assert await line.commit.put(*computed) == computed

    run_line(on_loop, engine, body)


def test_a_prompt_is_shared_while_its_first_user_still_runs(on_loop, null_engine):
    engine = null_engine()
    first, second = engine.sequence(PROMPT), engine.sequence([*PROMPT[:7], 50, 51])

    async def body(line):
        await line.commit.put(*await line.compute_prompt(first))
        await line.compute_prompt(second)
        assert not first.ended
        assert second.prefix_hit_tokens == 7
        assert second.kv.blocks[0] == first.kv.blocks[0]  # one whole block is the same block
        assert second.kv.blocks[1] != first.kv.blocks[1]  # the block shared in part was copied

    run_line(on_loop, engine, body)


def test_the_same_prompts_in_flight_are_computed_once(on_loop, null_engine):
    engine = null_engine()
    sequences = [engine.sequence([*PROMPT, n, n]) for n in range(5)]

    async def body(line):
        await line.commit.put(*await line.compute_prompt(*sequences))
        await line.schedule.settled()
        assert len(line.schedule.sent) == 5
        assert [sequence.prefix_hit_tokens for sequence in sequences] == [0, 10, 10, 10, 10]

    run_line(on_loop, engine, body)


def test_without_it_a_prefix_is_computed_again_and_nobody_waits_for_ever(on_loop, null_engine):
    engine = null_engine()
    sequences = [engine.sequence([*PROMPT, n, n]) for n in range(3)]

    async def body(line):
        ended = await line.decode.put(*await line.compute_prompt(*sequences))
        while len(line.decode.sent) < 3:
            more = await line.prefill.put(*line.schedule.sent[len(ended) :])
            ended += await line.decode.put(*more)
        assert [sequence.prefix_hit_tokens for sequence in sequences] == [0, 0, 0]

    run_line(on_loop, engine, body)


@pytest.mark.parametrize(("outputs", "hit"), [(True, 13), (False, 10)])
def test_the_outputs_follow_when_the_sequence_ends(on_loop, null_engine, outputs, hit):
    engine = null_engine()
    first = engine.sequence(PROMPT, max_new_tokens=4)

    async def body(line):
        await line.decode.put(*await line.commit.put(*await line.compute_prompt(first)))
        assert first.ended
        # a second turn of the same chat: prompt and answer, and a new question
        second = engine.sequence([*PROMPT, *first.choices[0].output_tokens, 50, 51])
        await line.compute_prompt(second)
        assert second.prefix_hit_tokens == hit  # the last output token's KV was never needed, so never computed

    run_line(on_loop, engine, body, outputs=outputs)


def test_what_ended_before_its_prompt_was_computed_passes_and_commits_nothing(on_loop, null_engine):
    engine = null_engine()
    sequence = engine.sequence(PROMPT, interactive=True)

    async def body(line):
        leased = await line.schedule.put(*await line.lookup.put(sequence))
        engine.services.cancel([sequence.request])
        assert await line.commit.put(*await line.prefill.put(*leased)) == [sequence]
        assert engine.services.get_stats()["kv_cache"]["cached_blocks"] == 0

    run_line(on_loop, engine, body)


def test_to_unpin_what_is_not_pinned_does_nothing_and_says_so(on_loop, null_engine, caplog):
    caplog.set_level("DEBUG", "sageLLM")
    engine = null_engine()
    sequence = engine.sequence(PROMPT)
    sequence.request.unpin = True

    async def body(line):
        assert await line.commit.put(*await line.compute_prompt(sequence)) == [sequence]

    run_line(on_loop, engine, body)
    assert sequence.error is None
    assert f"request {sequence.request_id} unpins a prompt that is not pinned" in caplog.text
