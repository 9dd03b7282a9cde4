"""stdout_sink: results on standard output, as JSON lines or as text."""

from __future__ import annotations

import json
import os
import threading

import pytest

from sageLLM.operators.sinks.stdout_sink import StdoutSink
from sageLLM.records import Choice, DeadLetter, FinishReason, Pooling, Request, SamplingParams, Sequence, TokenDelta


@pytest.fixture
def show(drive, capfd):
    def run(*inputs, context=None, **config):
        drive(StdoutSink, config, inputs, context)
        return capfd.readouterr().out

    return run


def delta(request_id, text, n=1):
    return TokenDelta(Sequence(Request(request_id, sampling=SamplingParams(n=n)), None, SamplingParams()), 0, [1], text)


def test_json_lines_are_those_of_jsonl_sink(show, make_completion):
    first, second = show([make_completion("q1"), delta("q2", "x"), DeadLetter("bad", "{")]).splitlines()
    assert (json.loads(first)["text"], json.loads(second)["error"]) == ("four", "bad")


def test_text_is_only_what_the_model_said(show, make_completion):
    two = make_completion("q2", "a")
    two.choices.append(Choice(1, [6], "b", FinishReason.STOP))
    embedded = make_completion("q3", "", pooling=Pooling.MEAN)
    records = [make_completion("q1", "fóur"), two, embedded, DeadLetter("bad")]
    assert show(records, format="text") == "fóur\na\nb\nerror: bad\n"


def test_tokens_appear_as_they_come(show, make_completion):
    assert show([delta("q1", "fo")], [delta("q1", "ur")], format="text") == "four"
    assert show([delta("q1", "fo")], [make_completion("q1", "four")], format="text") == "four\n"


def test_while_one_request_streams_others_wait_for_their_end(show, make_completion):
    records = [delta("q1", "fo"), delta("q2", "si"), delta("q1", "ur"), make_completion("q3", "ten")]
    rest = [make_completion("q1", "four"), delta("q2", "x"), make_completion("q2", "six"), delta("q4", "t")]
    assert show(records, rest, format="text") == "fourten\n\nsix\nt"


def test_a_reader_that_goes_away_ends_the_flow_cleanly(drive, make_completion, make_context, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    drains = []
    with open(writing, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        drive(StdoutSink, {}, [[make_completion()], [make_completion()]], make_context(drains=drains))
    assert drains == ["standard output was closed by its reader"]


def test_a_slow_reader_gets_everything(drive, make_completion, monkeypatch):
    reading, writing = os.pipe()
    received = []

    def read():
        with open(reading, "rb") as pipe:
            received.extend(pipe.read().splitlines())

    reader = threading.Thread(target=read)
    with open(writing, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        reader.start()
        drive(StdoutSink, {}, [[make_completion(f"q{i}", "x" * 3000) for i in range(50)]] * 4)
    reader.join()
    assert [json.loads(line)["request_id"] for line in received] == [f"q{i}" for i in range(50)] * 4


def test_something_in_memory_may_stand_in_for_stdout(drive, make_completion, capsys):
    drive(StdoutSink, {"format": "text"}, [[make_completion("q1", "four")]])
    assert capsys.readouterr().out == "four\n"
