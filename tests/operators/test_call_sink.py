"""call_sink: results to whoever made the request through SageLLMEngine."""

from __future__ import annotations

import pytest

from sageLLM.operators.sinks.call_sink import CallSink
from sageLLM.records import DeadLetter, TokenDelta


class Caller:
    """Writes down what it is told."""

    def __init__(self):
        self.told = []

    def receive_delta(self, delta):
        self.told.append(delta)

    def receive_end(self, record):
        self.told.append(record)


@pytest.fixture
def deliver(on_loop, null_engine):
    """Submit calls for these requests, pass records to the sink; returns each caller's notes."""

    def run(requests, *records):
        engine = null_engine()
        callers = [Caller() for _ in requests]
        engine.services.calls.submit(list(zip(requests, callers, strict=True)))

        async def main():
            async with engine.stage(CallSink) as sink:
                await sink.put(*records)

        on_loop(main)
        run.calls = engine.services.calls
        return [caller.told for caller in callers]

    return run


def test_each_caller_gets_its_own_end(deliver, make_completion):
    first, second = make_completion("a"), make_completion("b")
    letter = DeadLetter("too long", request=make_completion("c").request)
    requests = [first.request, second.request, letter.request]
    assert deliver(requests, second, letter, first) == [[first], [second], [letter]]


def test_the_same_id_twice_is_no_confusion(deliver, make_completion):
    first, second = make_completion("same"), make_completion("same")
    assert deliver([first.request, second.request], second, first) == [[first], [second]]


def test_deltas_come_before_the_end_and_nothing_after_it(deliver, make_completion, null_engine):
    sequence = null_engine().sequence([1, 2], stream=True)
    deltas = [TokenDelta(sequence, 0, [n], str(n)) for n in range(3)]
    completion = make_completion()
    completion.request = sequence.request
    (told,) = deliver([sequence.request], *deltas, completion, deltas[0], completion)
    assert told == [*deltas, completion]


def test_what_nobody_called_for_is_nobodys(deliver, make_completion):
    mine = make_completion("mine")
    others = [make_completion("other"), DeadLetter("a line that is no request")]
    assert deliver([mine.request], *others) == [[]]


def test_when_the_flow_dies_every_caller_still_hears_an_end(deliver, make_completion):
    done, left = make_completion("a"), make_completion("b")
    told = deliver([done.request, left.request], done)
    deliver.calls.fail_all("the engine failed: no device")
    assert told[0] == [done]
    ((letter,),) = [told[1]]
    assert (letter.error, letter.request) == ("the engine failed: no device", left.request)
