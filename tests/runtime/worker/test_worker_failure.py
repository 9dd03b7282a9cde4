"""The step loop itself fails: whoever waits for a sequence gets it back, and nobody waits for ever."""

from __future__ import annotations

import pytest

from sageLLM.errors import EngineClosedError
from sageLLM.runtime.scheduler.lease import PrefixHint


def fail_and_abandon(b):
    """What a driver does. Returns what the two doors get."""
    with pytest.raises((AssertionError, RuntimeError)) as raised:
        for _ in range(100):
            b.worker.step()
    back = []
    b.worker.on_prefilled = b.worker.on_decoded = back.extend
    b.worker.abandon(raised.value)
    return back


def test_the_sequences_that_were_going_in_come_back(bench):
    b = bench()
    good, bad, behind = (b.sequence([i, i], 4) for i in range(3))
    b.offer(good, bad, behind)
    granted = b.waiting.take_granted()
    bad.kv = PrefixHint(0)  # an operator on the way has overwritten its lease
    b.worker.submit_prefill(granted)
    assert {id(sequence) for sequence in fail_and_abandon(b)} == {id(good), id(bad), id(behind)}
    assert all("the worker failed: AssertionError" in sequence.error for sequence in granted)
    assert all(sequence.ended for sequence in granted)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_they_come_back_also_when_the_books_are_wrong(bench, steps, monkeypatch):
    b = bench()
    sequences = [b.sequence([i] * 3, 8, n=2) for i in range(3)]
    b.offer(*sequences)
    b.worker.submit_prefill(b.waiting.take_granted())
    for _ in range(steps):
        b.worker.step()

    def broken(*_):
        raise RuntimeError("no such block")

    monkeypatch.setattr(b.kv, "release", broken)
    back = fail_and_abandon(b)
    assert {id(sequence) for sequence in back} == {id(sequence) for sequence in sequences}
    assert all(sequence.error and sequence.ended for sequence in sequences)


def test_a_failed_worker_takes_nothing_more(bench):
    b = bench()
    b.worker.abandon(RuntimeError("no device"))
    with pytest.raises(EngineClosedError, match="no device"):
        b.worker.submit_prefill([])


def test_its_steps_are_over_when_it_has_failed(bench, monkeypatch):
    """Tiers bring KV into blocks that a step launched before may still write to: they wait for its end."""
    b = bench()
    b.offer(b.sequence([1, 2], 9))
    b.worker.submit_prefill(b.waiting.take_granted())
    launch, under_way = b.worker._executor.launch, []

    class Step:
        def __init__(self, plan):
            self.plan = launch(plan)
            under_way.append(self)

        def result(self):
            under_way.remove(self)
            raise RuntimeError("and that fails, too")

    monkeypatch.setattr(b.worker._executor, "launch", Step)
    b.worker.step()
    assert under_way
    b.worker.on_prefilled = b.worker.on_decoded = [].extend
    b.worker.abandon(RuntimeError("no device"))
    assert not under_way
    assert not b.worker.num_unread


def test_who_waits_behind_preempted_rows_hears_of_the_failure(bench):
    b = bench(blocks=8)
    running, waiting = [b.sequence([i] * 14, 14) for i in range(2)], b.sequence([9], 2)
    b.offer(*running)
    b.worker.submit_prefill(b.waiting.take_granted())
    while not b.leases.paused:
        b.worker.step()
    b.offer(waiting)
    assert b.waiting.take_granted() == []
    told = []
    b.worker.on_prefilled = b.worker.on_decoded = lambda records: None
    b.worker.on_leases_returned = lambda: told.append(None)
    b.worker.abandon(RuntimeError("no device"))
    assert told
    assert b.waiting.take_granted() == [waiting]
    with pytest.raises(EngineClosedError, match="no device"):
        b.worker.submit_prefill([waiting])
