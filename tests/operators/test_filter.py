"""filter: conditions or a function decide what passes; the rest ends, or takes another way."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

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
    ],
)
def test_conditions(through, make_completion, condition, kept_texts):
    completions = [
        make_completion(str(n), text, [1] * (n + 1), tenant="max") for n, text in enumerate("abc")
    ]  # fmt: skip
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
    with pytest.raises(ValidationError, match=message):
        Filter.config_model(**config)
