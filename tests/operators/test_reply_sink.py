"""reply_sink: results to whoever waits for them."""

from __future__ import annotations

from copy import copy
from pathlib import Path

import pytest

import sageLLM
from sageLLM.config import SageLLMConfig
from sageLLM.graph import load_pipeline
from sageLLM.operators.sinks.reply_sink import ReplySink
from sageLLM.records import Choice, Completion, DeadLetter, FinishReason, Request, TokenDelta
from sageLLM.runtime.assembly import assemble
from sageLLM.runtime.calls import CallDesk, Caller
from sageLLM.runtime.flow.ledger import Outcome
from sageLLM.runtime.services import EngineServices

SERVE = Path(sageLLM.__file__).parent / "pipelines" / "serve.yaml"


class Notes(Caller):
    """Writes down what it is told."""

    def __init__(self):
        self.told = []

    def receive_delta(self, delta):
        self.told.append(delta)

    def receive_end(self, record, outcome):
        self.told.append((record, outcome))


@pytest.fixture
def deliver(on_loop, null_engine):
    """Pass records to the sink; returns what the caller of each request was told."""

    def run(requests, *records):
        callers = [Notes() for _ in requests]
        for request, caller in zip(requests, callers, strict=True):
            request.caller = caller

        async def main():
            async with null_engine().stage(ReplySink) as sink:
                await sink.put(*records)

        on_loop(main)
        return [caller.told for caller in callers]

    return run


def test_each_caller_gets_its_own_end_and_how_it_ended(deliver, make_completion):
    first, second = make_completion("a"), make_completion("b")
    second.choices[0].finish_reason = FinishReason.QUEUE_TIMEOUT
    letter = DeadLetter("too long", request=make_completion("c").request)
    requests = [first.request, second.request, letter.request]
    assert deliver(requests, second, letter, first) == [
        [(first, Outcome.DONE)],
        [(second, Outcome.SHED)],
        [(letter, Outcome.ERROR)],
    ]


def test_the_same_id_twice_is_no_confusion(deliver, make_completion):
    first, second = make_completion("same"), make_completion("same")
    told = deliver([first.request, second.request], second, first)
    assert told == [[(first, Outcome.DONE)], [(second, Outcome.DONE)]]


def test_deltas_come_before_the_end_and_nothing_after_it(deliver, make_completion, null_engine):
    sequence = null_engine().sequence([1, 2], stream=True)
    deltas = [TokenDelta(sequence, 0, [n], str(n)) for n in range(3)]
    completion = make_completion()
    completion.request = sequence.request
    (told,) = deliver([sequence.request], *deltas, completion, deltas[0], completion)
    assert told == [*deltas, (completion, Outcome.DONE)]


def test_what_nobody_waits_for_ends_here_too(deliver, make_completion):
    mine = make_completion("mine")
    others = [make_completion("other"), DeadLetter("a line that is no request")]
    assert deliver([mine.request], *others) == [[]]


def test_the_first_end_of_a_copied_request_counts(deliver):
    request = Request("r", prompt="hi")
    ends = [Completion(request, [Choice(text=text)], 1) for text in ("first", "second")]
    assert deliver([request], *ends) == [[(ends[0], Outcome.DONE)]]


def test_a_copy_that_ends_elsewhere_is_no_end_while_another_is_under_way():
    services = EngineServices(SageLLMConfig.model_validate({"model": {"model_id": "builtin:null"}}))
    ledger = assemble(load_pipeline(SERVE), services).ledger
    request = Request("r", prompt="hi")
    request.caller = Notes()
    twin = copy(request)
    ledger.accept([request])
    ledger.fork_request(request, twin)
    ledger.settle([(twin, Outcome.DONE)])  # left out by a filter
    assert request.caller.told == []
    ledger.settle([(request, Outcome.ERROR)])
    assert request.caller.told == [(None, Outcome.ERROR)]


def test_when_the_flow_dies_every_call_of_a_program_still_hears_an_end():
    calls, requests = CallDesk(), [Request(name, prompt="hi") for name in ("ended", "open")]
    for request in requests:
        request.caller = Notes()
    calls.submit(requests)
    calls.forget([(requests[0], Outcome.DONE)])
    calls.fail_all("the engine failed: no device")
    assert requests[0].caller.told == []
    (((letter, outcome),),) = [requests[1].caller.told]
    assert (letter.error, letter.request, outcome) == ("the engine failed: no device", requests[1], Outcome.ERROR)
