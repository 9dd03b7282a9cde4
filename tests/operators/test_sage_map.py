"""sage_map: a MapFunction of SAGE on requests and completions; what it cannot do becomes a dead letter."""

from __future__ import annotations

import json
import sys
import threading

import anyio
import numpy as np
import pytest

pytest.importorskip("sage.foundation", reason='needs SAGE: pip install "sagellm[sage]"')

from click.testing import CliRunner
from sage.foundation import FilterFunction, MapFunction

from sageLLM.cli.main import cli
from sageLLM.errors import ConfigError
from sageLLM.operators.sage_map import SageMap
from sageLLM.records import Request, TokenDelta

HERE = __name__


class Shout(MapFunction):
    """Makes `text` or `prompt` loud, in the dictionary that it gets."""

    def __init__(self, marks=1):
        super().__init__()
        self.marks = marks

    def execute(self, data):
        name = "text" if "text" in data else "prompt"
        return {**data, name: data[name].upper() + "!" * self.marks}


class Return(MapFunction):
    """Gives back what it was constructed with."""

    def __init__(self, value=None):
        super().__init__()
        self.value = value

    def execute(self, data):
        return self.value


class Watched(MapFunction):
    seen, closed = [], []

    def execute(self, data):
        self.seen.append((data, threading.current_thread()))
        return data

    def close(self):
        self.closed.append(self)


class OnlyLong(MapFunction):
    def execute(self, data):
        return data if len(data["text"]) > 4 else None


class Blocked(MapFunction):
    asked, answered = threading.Semaphore(0), threading.Semaphore(0)

    def execute(self, data):
        self.asked.release()
        assert self.answered.acquire(timeout=30)
        return "answered"


class Keep(FilterFunction):
    def execute(self, data):
        return True


@pytest.fixture
def mapped(through):
    """`mapped(Shout, records, **kwargs)` -> (what came out, what was rejected, the ledger's counts)."""

    def run(function, records, **kwargs):
        kept, counts = through(SageMap, {"function": f"{HERE}:{function.__name__}", "kwargs": kwargs}, records)
        return kept["out"], kept["error"], counts

    return run


@pytest.fixture(autouse=True)
def imported(monkeypatch):
    """As --allow-module does."""
    monkeypatch.setitem(sys.modules, HERE, sys.modules.get(HERE, sys.modules[__name__]))


def test_a_completion_gets_the_text_that_comes_back(mapped, make_completion):
    completions = [make_completion("q1", "one"), make_completion("q2", "two")]
    out, _, counts = mapped(Shout, completions, marks=2)
    assert out == completions, "a completion stays that of its request"
    assert [completion.text for completion in out] == ["ONE!!", "TWO!!"]
    assert counts == {"accepted": 2, "done": 2}


def test_it_sees_what_it_would_behind_generate_in_a_sage_flow(mapped, make_completion):
    Watched.seen.clear()
    mapped(Watched, [make_completion("q1", "one"), Request("q2", messages=[{"role": "user", "content": "hi"}])])
    completion, request = (data for data, _ in Watched.seen)
    assert completion == {
        "text": "one",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        "finish_reason": "stop",
        "context": {"prompt": "2+2", "request_id": "q1"},
    }
    assert request == {"messages": [{"role": "user", "content": "hi"}], "request_id": "q2"}


def test_it_runs_on_another_thread_and_is_closed(mapped, make_completion):
    Watched.seen.clear()
    Watched.closed.clear()
    mapped(Watched, [make_completion("q1")])
    assert Watched.seen[0][1] is not threading.current_thread()
    assert len(Watched.closed) == 1


def test_a_function_that_blocks_does_not_stop_the_flow(null_engine, on_loop, make_completion):
    async def main():
        async with null_engine().stage(SageMap, function=f"{HERE}:Blocked") as stage:
            await stage.inlet.send([make_completion("q1")])
            await anyio.to_thread.run_sync(Blocked.asked.acquire)
            Blocked.answered.release()  # which it waits for
            await stage.until(lambda: stage.sent)
        assert stage.sent[0].text == "answered"

    on_loop(main)


def test_a_request_gets_the_prompt_that_comes_back(mapped):
    requests = [Request("a", prompt="quiet"), Request("b", prompt="too", tenant="t")]
    out, _, _ = mapped(Shout, requests)
    assert out == requests
    assert [(request.prompt, request.tenant) for request in out] == [("QUIET!", ""), ("TOO!", "t")]


@pytest.mark.parametrize(
    ("value", "prompt", "messages"),
    [
        ("text", "text", None),
        ({"prompt": "text"}, "text", None),
        ({"messages": [{"role": "user", "content": "hi"}]}, None, [{"role": "user", "content": "hi"}]),
    ],
)
def test_a_prompt_may_be_a_text_or_messages(mapped, value, prompt, messages):
    (request,), _, _ = mapped(Return, [Request("a", prompt="before")], value=value)
    assert (request.prompt, request.messages) == (prompt, messages)


def test_none_ends_a_record_here_and_it_is_counted(mapped, make_completion):
    out, letters, counts = mapped(OnlyLong, [make_completion("a", "short"), make_completion("b", "no")])
    assert [completion.request_id for completion in out] == ["a"]
    assert not letters
    assert counts == {"accepted": 2, "done": 2, "filtered": 1}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (5, "found 5: return a text, or a dictionary with a 'text'"),
        ({"answer": "x"}, "return a text, or a dictionary with a 'text'"),
        ({"text": "x", "score": 1}, "'score' is new: only text can be given back"),
        ({"text": "x", "finish_reason": "length"}, "'finish_reason' is changed"),
    ],
)
def test_what_a_completion_has_no_place_for_is_a_dead_letter(mapped, make_completion, value, told):
    out, letters, counts = mapped(Return, [make_completion("a")], value=value)
    assert not out
    assert told in letters[0].error
    assert counts == {"accepted": 1, "error": 1}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (5, "found 5: return a text, or a dictionary with one of prompt, messages, prompt_tokens"),
        ({}, "found no prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "found prompt and messages"),
        ({"prompt": "a", "options": {"n": 2}}, "'options' is new"),
        ({"prompt": "a", "request_id": "mine"}, "'request_id' is changed"),
    ],
)
def test_so_is_what_a_request_has_no_place_for(mapped, value, told):
    out, letters, _ = mapped(Return, [Request("a", prompt="before")], value=value)
    assert not out
    assert told in letters[0].error


def test_a_record_for_which_it_raises_is_a_dead_letter_and_the_others_go_on(mapped):
    requests = [Request("a", prompt="x"), Request("b", prompt_tokens=[1]), Request("c", prompt="z")]
    out, letters, counts = mapped(Shout, requests)
    assert [request.prompt for request in out] == ["X!", "Z!"]
    assert letters[0].request is requests[1]
    assert "tested: KeyError: 'prompt'" in letters[0].error
    assert counts == {"accepted": 3, "done": 2, "error": 1}


def test_of_an_embedding_nothing_can_change(mapped, make_completion):
    def embeddings():
        completions = [make_completion("a", pooling="mean"), make_completion("b", pooling="mean")]
        for completion in completions:
            completion.embedding = np.ones(2, np.float32)
        return completions

    kept = embeddings()
    assert mapped(Watched, kept)[0] == kept
    _, letters, _ = mapped(Return, embeddings(), value={"embedding": [0.0, 0.0]})
    assert "'embedding' is changed: only None can be given back" in letters[0].error


def test_token_deltas_pass_untouched_and_together(drive, make_completion):
    deltas = [TokenDelta(None, 0, [n]) for n in range(3)]
    outlet = drive(SageMap, {"function": f"{HERE}:Shout"}, [[*deltas, make_completion("a", "one")]])
    assert outlet.sent[:3] == deltas
    assert outlet.sent[3].text == "ONE!"
    assert outlet.lists == [3, 1]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"function": "Shout"}, "write the module and the class, as in 'my_functions:Shout'"),
        ({"function": "nowhere:Shout"}, "module 'nowhere' is not imported: add --allow-module nowhere"),
        ({"function": f"{HERE}:Shoutt"}, "has no 'Shoutt'"),
        ({"function": f"{HERE}:Keep"}, "no class that is derived from sage.foundation.MapFunction"),
        ({"function": "json:loads"}, "no class that is derived from sage.foundation.MapFunction"),
        ({"function": f"{HERE}:Shout", "kwargs": {"mark": 1}}, "unexpected keyword argument 'mark'"),
    ],
)
def test_a_function_that_is_none_is_told_before_anything_runs(config, told):
    with pytest.raises(ConfigError, match=told):
        SageMap.config_model(**config)


PIPELINE = """
engine: {model: {model_id: "builtin:null"}}
operators:
  read: {type: jsonl_source, path: in.jsonl}
  shout: {type: sage_map, function: "sage_functions:Shout", kwargs: {marks: 2}}
  tokenize: {}
  schedule: {}
  prefill: {}
  decode: {}
  detokenize: {}
  cut: {type: sage_map, function: "sage_functions:Cut"}
  write: {type: jsonl_sink, path: out.jsonl}
  dead: {type: jsonl_sink, path: dead.jsonl}
edges:
  - read -> shout -> tokenize -> schedule -> prefill -> decode -> detokenize -> cut -> write
  - "*.error -> dead"
"""
FUNCTIONS = """
from sage.foundation import MapFunction

class Shout(MapFunction):
    def __init__(self, marks):
        super().__init__()
        self.marks = marks
    def execute(self, data):
        return data["prompt"] + "!" * self.marks

class Cut(MapFunction):
    def execute(self, data):
        return {**data, "text": data["text"][:2] + data["context"]["prompt"]}
"""


def test_in_a_pipeline_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "p.yaml").write_text(PIPELINE)
    (tmp_path / "sage_functions.py").write_text(FUNCTIONS)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "max_tokens": 4}\n')
    refused = CliRunner().invoke(cli, ["validate", "p.yaml"])
    assert refused.exit_code == 78
    assert "p.yaml:5:37: operator 'shout' (sage_map), field 'function': found 'sage_functions:Shout'" in refused.output
    assert "module 'sage_functions' is not imported: add --allow-module sage_functions" in refused.output
    done = CliRunner().invoke(cli, ["run", "p.yaml", "-q", "--allow-module", "sage_functions"])
    monkeypatch.delitem(sys.modules, "sage_functions")
    assert done.exit_code == 0, done.output
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == "dea!!"
