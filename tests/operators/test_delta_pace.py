"""How often deltas leave decode: what comes while the last ones are being passed on waits, and is joined."""

from __future__ import annotations

import anyio
import pytest
import trio
from trio.testing import MockClock

from sageLLM.operators.delta_pace import DeltaPace


def test_at_first_none_rests():
    told = []
    pace = DeltaPace(told.append)
    assert told == [False]  # a pace before it may have failed within a rest
    assert not pace.rests


@pytest.mark.parametrize(("turn_s", "rest_s"), [(0.0, 0.0), (0.0005, 0.012), (0.1, 0.03)])
def test_passing_on_takes_a_quarter_of_the_time_at_most_and_nobody_waits_longer_than_30_ms(turn_s, rest_s):
    told = []

    async def main():
        pace = DeltaPace(lambda rests: told.append((rests, trio.current_time() - begun)))
        pace.begin_rest()
        assert pace.rests
        with pytest.MonkeyPatch.context() as patch:
            checkpoint = trio.sleep
            patch.setattr("sageLLM.operators.delta_pace.anyio.lowlevel.checkpoint", lambda: checkpoint(turn_s))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pace.rest)
                await trio.testing.wait_all_tasks_blocked()
                assert pace.rests == (turn_s > 0)
        assert not pace.rests

    async def at_time():
        nonlocal begun
        begun = trio.current_time()
        await main()

    begun = 0.0
    trio.run(at_time, clock=MockClock(autojump_threshold=0))
    assert told == [(False, 0), (True, 0), (False, pytest.approx(8 * turn_s + rest_s))]
