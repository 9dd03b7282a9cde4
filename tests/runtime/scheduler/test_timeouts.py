"""Timeouts: the one that comes first ends a request, under its own name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sageLLM.records import FinishReason
from sageLLM.runtime.scheduler.lease import LeaseBook
from sageLLM.runtime.scheduler.timeouts import NEVER, End, Timeouts


@pytest.fixture
def call(bench):
    """Somebody waits for it; it arrived at 100 and came to `schedule` at 101."""
    sequence = bench().sequence(range(4), interactive=True)
    sequence.request.arrival, sequence.timings.queued = 100.0, 101.0
    return sequence


@pytest.mark.parametrize(
    ("timeouts", "waiting", "running", "started"),
    [
        (Timeouts(0, 0, 0), NEVER, NEVER, NEVER),
        (Timeouts(5, 0, 0), End(106, FinishReason.QUEUE_TIMEOUT), NEVER, NEVER),
        (Timeouts(0, 5, 0), End(105, FinishReason.FIRST_TOKEN_TIMEOUT), End(105, "first_token_timeout"), NEVER),
        (Timeouts(0, 0, 5), *[End(105, FinishReason.TIMEOUT)] * 3),
        (Timeouts(1, 3, 9), End(102, "queue_timeout"), End(103, "first_token_timeout"), End(109, "timeout")),
        (Timeouts(9, 9, 3), *[End(103, "timeout")] * 3),
    ],
)
def test_the_first_one_counts_and_those_that_are_met_do_not(call, timeouts, waiting, running, started):
    assert timeouts.end_of_waiting(call) == waiting
    assert timeouts.end_of_running(call) == running
    call.timings.first_token = 102.5
    assert timeouts.end_of_running(call) == started


def test_lines_of_a_file_have_none(call):
    call.request.interactive = False
    assert Timeouts(1, 1, 1).end_of_waiting(call) == Timeouts(1, 1, 1).end_of_running(call) == NEVER


def running_since(b, sequence, seconds):
    """Let it have arrived that long ago, and be on the worker."""
    sequence.request.arrival -= seconds
    b.offer(sequence)
    b.worker.submit_prefill(b.waiting.take_granted())


def test_without_a_first_token_in_time_a_running_prompt_ends(bench):
    b = bench(max_step_tokens=4, first_token_timeout_s=100, request_timeout_s=0)
    call, line = b.sequence(range(40), interactive=True), b.sequence(range(50, 90))
    running_since(b, call, 0)
    running_since(b, line, 1000)
    b.worker.step()
    b.worker._table.timeout -= 1000
    call.request.arrival -= 1000
    assert b.run() == [call, line]
    assert call.choices[0].finish_reason is FinishReason.FIRST_TOKEN_TIMEOUT
    assert line.choices[0].finish_reason is FinishReason.LENGTH
    b.check_nothing_leaks()


@pytest.mark.parametrize(("request_timeout_s", "reason"), [(0, "length"), (500, "timeout"), (5000, "length")])
def test_with_a_first_token_in_time_only_the_total_counts(bench, request_timeout_s, reason):
    b = bench(first_token_timeout_s=100, request_timeout_s=request_timeout_s)
    calls = [b.sequence(range(n, n + 10), 40, n=2, interactive=True) for n in (0, 100)]
    for call in calls:
        running_since(b, call, 0)
    while not all(call.timings.first_token for call in calls):
        b.worker.step()
    b.worker._table.timeout -= 1000
    for call in calls:
        call.request.arrival -= 1000
    b.run()
    assert [choice.finish_reason for call in calls for choice in call.choices] == [reason] * 4
    b.check_nothing_leaks()


def test_a_fetch_that_is_late_is_looked_at_once_while_there_is_no_room(bench, monkeypatch):
    now = [100.0]
    b = bench(max_batch_size=1, clock=lambda: now[0])
    first, second = b.sequence([1] * 9, 4), b.sequence([2] * 9, 4)
    b.offer(first, second)
    assert b.waiting.take_granted() == [first]
    monkeypatch.setattr(LeaseBook, "num_fetching", 2)
    second.kv.fetch = SimpleNamespace(deadline=101.0)
    assert b.waiting.next_timeout() == 101.0
    now[0] = 101.0
    assert b.waiting.next_timeout() == 101.0
    assert b.waiting.take_granted() == []
    assert b.waiting.next_timeout() == float("inf"), "the copy's end, or room, wakes who waits"
