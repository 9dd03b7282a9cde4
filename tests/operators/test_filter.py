"""filter: conditions or a function decide what passes; the rest ends, or takes another way."""

from __future__ import annotations

import pytest

from sageLLM.errors import ConfigError, PipelineError
from sageLLM.graph import load_pipeline
from sageLLM.graph.operator_spec import RecordKind
from sageLLM.operators.filter import Filter
from sageLLM.operators.functions import register_function
from sageLLM.records import DeadLetter, Request, Sequence, TokenDelta


@register_function("test_filter.is_even")
def is_even(request):
    return int(request.request_id) % 2 == 0


@register_function("test_filter.is_even_later")
async def is_even_later(request):
    return is_even(request)


def requests(count, **fields):
    return [Request(str(number), prompt="p", **fields) for number in range(count)]


def ids(records):
    return [record.request_id for record in records]


@pytest.mark.parametrize("function", ["is_even", "is_even_later"])
def test_a_function_keeps_what_it_says_yes_to(through, function):
    kept, counts = through(Filter, {"function": f"test_filter.{function}"}, requests(6))
    assert ids(kept["out"]) == ["0", "2", "4"]
    assert counts == {"accepted": 6, "done": 6, "filtered": 3}


def test_what_is_left_takes_the_port_rest_if_that_has_an_edge(through):
    kept, counts = through(Filter, {"function": "test_filter.is_even"}, requests(6), ["out", "error", "rest"])
    assert ids(kept["rest"]) == ["1", "3", "5"]
    assert counts == {"accepted": 6, "done": 6}


@pytest.mark.parametrize(
    ("condition", "kept_texts"),
    [
        ({"field": "choices.0.text", "value": "b"}, "b"),
        ({"field": "choices.0.text", "op": "!=", "value": "b"}, "ac"),
        ({"field": "choices.0.text", "op": "matches", "value": "^[ab]$"}, "ab"),
        ({"field": "choices.0.finish_reason", "op": "in", "value": ["stop", "length"]}, "abc"),
        ({"field": "choices.0.text", "op": "not in", "value": ["a"]}, "bc"),
        ({"field": "metrics.ttft_ms", "op": "<", "value": 20.0}, ""),
        ({"field": "metrics.ttft_ms", "op": "<=", "value": 20}, "abc"),
        ({"field": "metrics.ttft_ms", "op": ">", "value": 1}, "abc"),
        ({"field": "output_length", "op": ">=", "value": 3}, "c"),
        ({"field": "request.tenant", "op": "contains", "value": "x"}, "abc"),
        ({"field": "text", "op": "matches", "value": "^[ab]$"}, "ab"),
        ({"field": "finish_reason", "value": "stop"}, "abc"),
        ({"field": "output_tokens", "op": "contains", "value": 1}, "abc"),
        ({"field": "usage.completion_tokens", "op": "<", "value": 3}, "ab"),
        ({"field": "usage.total_tokens", "value": 6}, "c"),
        ({"field": "src.line", "op": ">", "value": 1}, "bc"),
        ({"field": "request_id", "op": "!=", "value": "1"}, "ac"),
    ],
)
def test_conditions(through, make_completion, condition, kept_texts):
    completions = [
        make_completion(str(n), text, [1] * (n + 1), line=n + 1, tenant="max") for n, text in enumerate("abc")
    ]
    kept, _ = through(Filter, {"where": [condition]}, completions)
    assert [completion.choices[0].text for completion in kept["out"]] == list(kept_texts)


def test_all_conditions_must_hold(through):
    where = [{"field": "request_id", "op": ">", "value": "1"}, {"field": "tenant", "value": ""}]
    kept, _ = through(Filter, {"where": where}, requests(4))
    assert ids(kept["out"]) == ["2", "3"]


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"where": [{"field": "nothing", "value": 1}]}, "tested: a Request has no field 'nothing'"),
        ({"where": [{"field": "prompt", "op": "<", "value": 1}]}, "prompt is 'p', which is not to be compared with 1"),
        ({"function": "test_filter.is_even"}, "tested: ValueError: invalid literal"),
    ],
)
def test_a_record_that_cannot_be_judged_becomes_a_dead_letter(through, config, error):
    bad = Request("no number", prompt="p")
    kept, counts = through(Filter, config, [bad])
    (letter,) = kept["error"]
    assert error in letter.error and letter.request is bad
    assert counts == {"accepted": 1, "error": 1}


def test_a_line_that_is_no_request_is_counted_once_even_if_it_cannot_be_judged(through):
    kept, counts = through(Filter, {"function": "test_filter.is_even"}, [DeadLetter("not JSON", raw="{")])
    assert kept["error"][0].error.startswith("not JSON; then tested: ") and kept["error"][0].raw == "{"
    assert counts == {"accepted": 1, "error": 1}


def test_deltas_pass(through, make_completion):
    completion = make_completion("1")
    delta = TokenDelta(Sequence(completion.request, None, completion.request.sampling), 0, [1])
    kept, _ = through(Filter, {"function": "test_filter.is_even"}, [completion, delta])
    assert kept["out"] == [delta]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "write either `where"),
        ({"function": "test_filter.is_evn"}, r"did you mean 'test_filter.is_even'\?"),
        ({"function": "test_filter.is_even", "where": [{"field": "a", "value": 1}]}, "write either `where"),
        ({"where": [{"field": "a.__class__", "value": 1}]}, "write names with dots between"),
        ({"where": [{"field": "a", "op": "matches", "value": "("}]}, "is no regular expression"),
        ({"where": [{"field": "a", "op": "in", "value": "abc"}]}, "is no list"),
    ],
)
def test_configurations_that_make_no_sense(config, message):
    with pytest.raises(ConfigError, match=message):
        Filter.config_model(**config)


COMPLETION, DEAD_LETTER = frozenset({RecordKind.COMPLETION}), frozenset({RecordKind.DEAD_LETTER})
REQUEST, SEQUENCE = frozenset({RecordKind.REQUEST}), frozenset({RecordKind.SEQUENCE, RecordKind.DELTA})


def misfits(kinds, field, op="==", value=1):
    config = Filter.config_model(where=[{"field": field, "op": op, "value": value}])
    return list(config.explain_misfits(kinds))


@pytest.mark.parametrize(
    ("kinds", "field"),
    [
        *((COMPLETION, name) for name in ("text", "metrics.e2e_ms", "choices.0.logprobs.3.top.0.1", "src.file")),
        *((REQUEST, name) for name in ("prompt", "messages.0.content", "sampling.stop.0", "priority")),
        *((SEQUENCE, name) for name in ("prompt_tokens.0", "request.tenant", "ended", "timings.queued")),
        *((DEAD_LETTER, name) for name in ("error", "line", "raw", "src.line", "request.prompt")),
        (COMPLETION | DEAD_LETTER, "error"),
    ],
)
def test_fields_that_there_are(kinds, field):
    assert misfits(kinds, field) == []


@pytest.mark.parametrize(
    ("kinds", "condition", "where", "why"),
    [
        (COMPLETION, ("txt",), "field", "completion has no field 'txt'; did you mean 'text'?"),
        (COMPLETION, ("metrics.e2e",), "field", "completion has no field 'metrics.e2e'; did you mean 'metrics.e2e_ms'"),
        (COMPLETION, ("choices.text",), "field", "completion has no field 'choices.text'; did you mean 'choices.0'?"),
        (REQUEST, ("text",), "field", "request has no field 'text'; did you mean 'tenant'?"),
        (SEQUENCE, ("txt",), "field", "sequence has no field 'txt'; write one of: choices, "),
        (COMPLETION, ("text", "<", 3), "value", "found 3 for '<', but text is a text"),
        (COMPLETION, ("output_length", ">=", "3"), "value", "found '3' for '>=', but output_length is a number"),
        (COMPLETION, ("usage", "<", 3), "value", "found 3 for '<', but usage is a record"),
        (COMPLETION, ("prompt_length", "matches", "3"), "value", "found '3' for 'matches', but prompt_length is "),
    ],
)  # fmt: skip
def test_conditions_that_no_record_can_meet(kinds, condition, where, why):
    ((path, told),) = misfits(kinds, *condition)
    assert path == ("where", 0, where)
    assert told.startswith(why)


def test_validate_tells_where_they_stand(tmp_path):
    stages = ["tokenize", "schedule", "prefill", "decode", "detokenize"]
    lines = ["operators:", "  read: {type: jsonl_source, path: a}", *(f"  {stage}: {{}}" for stage in stages)]
    lines += ["  write: {type: jsonl_sink, path: b}", "  short:", "    type: filter", "    where:"]
    lines += ["      - {field: tenannt, value: a}", "      - {field: prompt, op: '<', value: 3}"]
    chain = " -> ".join(["read", "short", *stages, "write"])
    (tmp_path / "p.yaml").write_text("\n".join([*lines, f"edges: [{chain}, '*.error -> write']\n"]))
    with pytest.raises(PipelineError) as caught:
        load_pipeline(tmp_path / "p.yaml")
    assert [problem.removeprefix(f"{tmp_path}/") for problem in caught.value.problems] == [
        "p.yaml:12:17: operator 'short' (filter), field 'where.0.field': request has no field 'tenannt'; "
        "did you mean 'tenant'?",
        "p.yaml:13:41: operator 'short' (filter), field 'where.1.value': found 3 for '<', but prompt is a text",
    ]
