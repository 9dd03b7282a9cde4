"""http_source: calls of tools, and outputs that conform to a form, with the `openai` package."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

CITY = {"type": "object", "properties": {"city": {"enum": ["Bern", "Rom"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}}]
FLAT = {"type": "function", **TOOLS[0]["function"]}  # as responses have it
ASK = {"messages": [{"role": "user", "content": "Rain in Bern?"}], "max_tokens": 200, "seed": 1}
ONE = {**ASK, "tools": TOOLS, "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def client(tool_server):
    with openai.OpenAI(base_url=tool_server.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_forced_call(client):
    answer = client.chat.completions.create(model="random", **ONE, tool_choice="required")
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    call = choice.message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments)["city"] in ("Bern", "Rom")


def test_a_forced_call_in_a_stream_is_the_same(client):
    named = {"type": "function", "function": {"name": "weather"}}
    forced = {**ONE, "tool_choice": named, "temperature": 0}
    whole = client.chat.completions.create(model="random", **forced).choices[0].message.tool_calls
    with client.chat.completions.stream(model="random", **forced) as stream:
        (choice,) = stream.get_final_completion().choices
    assert choice.finish_reason == "tool_calls"
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"] * len(whole)
    streamed = [call.function.arguments for call in choice.message.tool_calls]
    assert streamed == [call.function.arguments for call in whole]


def test_what_came_of_a_call(client):
    """The client's own message goes back, and the model is told of the call and its output."""
    answer = client.chat.completions.create(model="random", **ONE, tool_choice="required")
    message = answer.choices[0].message
    output = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "It rains."}
    lengths = [
        client.chat.completions.create(
            model="random", tools=TOOLS, messages=[*ASK["messages"], *more], max_tokens=1
        ).usage.prompt_tokens
        for more in ([], [message], [message, output])
    ]
    assert lengths == sorted(set(lengths))


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_no_call_is_forced(client, choice):
    """Random weights call nothing by themselves."""
    asked = {**ONE, "max_tokens": 5, "tool_choice": choice}
    (whole,) = client.chat.completions.create(model="random", **asked, temperature=0).choices
    assert (whole.message.tool_calls, whole.finish_reason) == (None, "length")
    stream = client.chat.completions.create(model="random", **asked, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.message.content


def test_calls_that_the_model_decides_on(serve_tools):
    """A model that can only write one text, as the pipeline's guide has it: words, a call, and another."""
    calls = [json.dumps({"name": "weather", "arguments": {"city": city}}) for city in ("Bern", "Rom")]
    text = "I see." + "".join(f"\n<tool_call>\n{call}\n</tool_call>" for call in calls)
    parts = " <[2]> ".join(json.dumps(part) for part in text.split("<tool_call>"))
    setting = f"operators.guide.guided_grammar={json.dumps(f'start: {parts}')}"
    with serve_tools(setting) as server, openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        asked = {"model": "random", **ASK, "tools": TOOLS}
        (choice,) = client.chat.completions.create(**asked).choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I see.")
        cities = [json.loads(call.function.arguments)["city"] for call in choice.message.tool_calls]
        assert cities == ["Bern", "Rom"]
        assert len({call.id for call in choice.message.tool_calls}) == 2

        with client.chat.completions.stream(**asked) as stream:
            (streamed,) = stream.get_final_completion().choices
        assert (streamed.finish_reason, streamed.message.content) == ("tool_calls", "I see.")
        assert [json.loads(call.function.arguments)["city"] for call in streamed.message.tool_calls] == cities
        assert client.chat.completions.create(**asked, tool_choice="none").choices[0].message.content == text

        flat = {"model": "random", "input": "Rain?", "max_output_tokens": 200, "tools": [FLAT]}
        whole = client.responses.create(**flat)
        with client.responses.stream(**flat) as stream:
            for response in (whole, stream.get_final_response()):
                assert [item.type for item in response.output] == ["message", "function_call", "function_call"]
                assert response.output_text == "I see."
                assert [json.loads(call.arguments)["city"] for call in response.output[1:]] == cities


class Weather(BaseModel):
    city: Literal["Bern", "Rom"]


STRICT = {**ONE, "tools": [openai.pydantic_function_tool(Weather)]}  # which are strict
BEGIN_A_CALL = {"2": 100}  # as logit_bias: what the model would begin with


@pytest.mark.parametrize(
    "options", [{"tool_choice": "required"}, {"logit_bias": BEGIN_A_CALL}, {"logit_bias": BEGIN_A_CALL, "n": 2}]
)
def test_calls_of_a_pydantic_function(client, options):
    """Forced, or begun by the model itself: the arguments conform."""
    answer = client.chat.completions.parse(model="random", **STRICT, **options)
    for choice in answer.choices:
        assert isinstance(choice.message.tool_calls[0].function.parsed_arguments, Weather)
        assert choice.finish_reason == "tool_calls"
    with client.chat.completions.stream(model="random", **STRICT, **options) as stream:
        message = stream.get_final_completion().choices[0].message
    assert isinstance(message.tool_calls[0].function.parsed_arguments, Weather)


def test_a_response_with_a_pydantic_function(client):
    asked = {"model": "random", "input": "Rain?", "tools": STRICT["tools"], "parallel_tool_calls": False}
    (item,) = client.responses.parse(**asked, extra_body={"logit_bias": BEGIN_A_CALL}).output
    assert isinstance(item.parsed_arguments, Weather)


def test_a_pydantic_function_or_an_answer_that_is_parsed(client):
    class Place(BaseModel):
        wet: bool

    asked = {**STRICT, "response_format": Place}
    called = client.chat.completions.parse(model="random", **asked, logit_bias=BEGIN_A_CALL).choices[0].message
    assert isinstance(called.tool_calls[0].function.parsed_arguments, Weather)
    said = client.chat.completions.parse(model="random", **asked, logit_bias={"2": -100}).choices[0].message
    assert isinstance(said.parsed, Place)
    assert not said.tool_calls


def test_strict_tools_that_the_model_does_not_call(client):
    """An answer is what it would be without `strict`."""
    loose = {"type": "function", "function": {**STRICT["tools"][0]["function"], "strict": False}}
    never = {"temperature": 0, "logit_bias": {"2": -100}, "max_tokens": 30}
    strict, free = (
        client.chat.completions.create(model="random", **{**STRICT, "tools": [tool], **never}).choices[0].message
        for tool in (STRICT["tools"][0], loose)
    )
    assert (strict.content, strict.tool_calls) == (free.content, None)


def test_a_strict_function_whose_schema_cannot_be_kept_is_refused(client):
    wrong = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": wrong, "strict": True}}
    with pytest.raises(openai.BadRequestError, match="^.*tools: ") as caught:
        client.chat.completions.create(model="random", **{**ASK, "tools": [tool]})
    assert caught.value.param == "tools"


def test_an_answer_parsed_into_a_model(client):
    class Place(BaseModel):
        city: Literal["Bern", "Rom"]
        wet: bool

    answer = client.chat.completions.parse(model="random", **ASK, response_format=Place)
    assert isinstance(answer.choices[0].message.parsed, Place)
    with client.chat.completions.stream(model="random", **ASK, response_format=Place) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Place)


def test_any_object_and_a_grammar(client):
    answer = client.chat.completions.create(model="random", **ASK, n=4, response_format={"type": "json_object"})
    for choice in answer.choices:
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
    grammar = {"guided_grammar": 'start: greeting "!"\ngreeting: "hello" | "bye"'}
    answer = client.chat.completions.create(model="random", **ASK, extra_body=grammar)
    assert answer.choices[0].message.content in ("hello!", "bye!")


def test_a_form_that_an_output_has(client):
    schema = {"name": "city", "schema": CITY}
    answer = client.chat.completions.create(
        model="random", **ASK, response_format={"type": "json_schema", "json_schema": schema}
    )
    assert json.loads(answer.choices[0].message.content)["city"] in ("Bern", "Rom")
    said = client.completions.create(model="random", prompt="?", extra_body={"guided_regex": "(yes|no)"})
    assert said.choices[0].text in ("yes", "no")


def test_a_form_that_is_none_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="regular expression|regex"):
        client.completions.create(model="random", prompt="?", extra_body={"guided_regex": "("})


def test_a_model_without_tools_refuses_them(tiny_server):
    with (
        openai.OpenAI(base_url=tiny_server.url, api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="tools"),
    ):
        client.chat.completions.create(model="builtin:pydoc-tiny", **ASK, tools=TOOLS)
