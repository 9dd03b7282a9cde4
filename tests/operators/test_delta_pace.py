"""How often deltas leave decode: what comes while the last ones are being passed on is joined."""

from __future__ import annotations

from types import SimpleNamespace

import anyio
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from sageLLM.operators.delta_pace import DeltaPace
from sageLLM.records import TokenDelta


def shown(records):
    return [
        (record.sequence.name, record.choice, record.tokens) if type(record) is TokenDelta else record.name
        for record in records
    ]


@pytest.fixture
def pace():
    return DeltaPace(on_rested=lambda: None)


def sequence(name="s"):
    return SimpleNamespace(name=name)


def test_the_first_delta_of_each_choice_goes_on_at_once(pace):
    one, other = sequence("a"), sequence("b")
    deltas = [TokenDelta(one, 0, [1]), TokenDelta(one, 1, [2]), TokenDelta(other, 0, [3])]
    assert pace.take([*deltas]) == deltas
    assert not pace.is_due


def test_what_comes_after_it_is_joined_until_it_is_released(pace):
    one = sequence()
    pace.take([TokenDelta(one, 0, [1])])
    assert pace.take([TokenDelta(one, 0, [2]), TokenDelta(one, 0, [3, 4])]) == []
    assert pace.is_due
    assert shown(pace.release()) == [("s", 0, [2, 3, 4])]
    assert not pace.is_due  # it rests
    assert pace.release() == []


def test_an_ended_sequence_takes_what_is_held_of_it_along_and_nothing_else(pace):
    one, other = sequence("a"), sequence("b")
    pace.take([TokenDelta(each, choice, [1]) for each in (one, other) for choice in (0, 1)])
    pace.take([TokenDelta(each, 1, [2]) for each in (one, other)])
    assert shown(pace.take([TokenDelta(one, 1, [3]), one])) == [("a", 1, [2, 3]), "a"]
    assert shown(pace.release()) == [("b", 1, [2])]


@pytest.mark.parametrize(("turn_s", "rest_s"), [(0.0, 0.0), (0.0005, 0.012), (0.1, 0.03)])
def test_passing_on_takes_a_quarter_of_the_time_at_most_and_nobody_waits_longer_than_30_ms(turn_s, rest_s):
    rested = []

    async def main():
        pace = DeltaPace(on_rested=lambda: rested.append(trio.current_time()))
        one = sequence()
        pace.take([TokenDelta(one, 0, [1])])
        pace.take([TokenDelta(one, 0, [2])])
        pace.release()
        pace.take([TokenDelta(one, 0, [3])])
        passed = trio.current_time() + 8 * turn_s
        with pytest.MonkeyPatch.context() as patch:
            checkpoint = trio.sleep
            patch.setattr("sageLLM.operators.delta_pace.anyio.lowlevel.checkpoint", lambda: checkpoint(turn_s))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pace.rest)
                await trio.testing.wait_all_tasks_blocked()
                assert pace.is_due == (turn_s == 0)
        assert pace.is_due
        assert rested == [pytest.approx(passed + rest_s)]

    trio.run(main, clock=MockClock(autojump_threshold=0))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.sampled_from(["delta", "delta", "end", "release"]))))
def test_tokens_arrive_once_in_order_and_before_the_end(events):
    pace, sequences, came = DeltaPace(on_rested=lambda: None), {}, []
    sent, told = {}, {}
    for number, (index, choice, event) in enumerate(events):
        if event == "release":
            came += pace.release()
            continue
        one = sequences.setdefault(index, sequence(f"{index}-{number}"))
        if event == "delta":
            sent.setdefault((one.name, choice), []).append(number)
            came += pace.take([TokenDelta(one, choice, [number])])
        else:
            came += pace.take([sequences.pop(index)])
    for one in sequences.values():
        came += pace.take([one])
    ended = set()
    for record in came:
        if type(record) is TokenDelta:
            assert record.sequence.name not in ended
            told.setdefault((record.sequence.name, record.choice), []).extend(record.tokens)
        else:
            ended.add(record.name)
    assert told == sent
