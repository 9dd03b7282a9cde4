"""POST /v1/responses, with the `openai` package."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Literal

import anyio
import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from sageLLM.operators.sources.openai.response_events import ResponseEvents
from sageLLM.operators.sources.openai.response_object import begin_response, output_of
from sageLLM.records import Choice, Completion, Request, TokenDelta, ToolCall

QUESTION = "What does heapq.heappush do?"
ANSWER = "Push item onto heap, maintaining the heap invariant."
FULL = {"input": QUESTION, "max_output_tokens": 40}
CITY = {"type": "object", "properties": {"city": {"enum": ["Bern", "Rom"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
WEATHER = {"type": "function", "name": "weather", "description": "Of a city.", "parameters": CITY}
CALLING = {"model": "random", "input": "Rain in Bern?", "max_output_tokens": 200, "tools": [WEATHER],
           "tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}  # fmt: skip


class Place(BaseModel):
    city: Literal["Bern", "Rom"]


@pytest.fixture
def tool_client(tool_server):
    with openai.OpenAI(base_url=tool_server.url, api_key="none", max_retries=0) as client:
        yield client


def prompt_tokens(client, model, messages):
    return client.chat.completions.create(model=model, messages=messages, max_tokens=1).usage.prompt_tokens


def test_a_text_is_answered(client, model):
    response = client.responses.create(model=model, **FULL, metadata={"a": "b"}, user="me")
    Response.model_validate(response.model_dump(warnings=False) | {"usage": None})  # which wants the price of caching
    (message,) = response.output
    assert response.output_text == message.content[0].text == ANSWER
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert (response.object, response.model, response.store) == ("response", model, False)
    assert (response.metadata, response.user, response.max_output_tokens) == ({"a": "b"}, "me", 40)
    assert response.id.startswith("resp_") and message.id.startswith("msg_")
    usage = response.usage
    assert usage.input_tokens == prompt_tokens(client, model, [{"role": "user", "content": QUESTION}])
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_what_is_cut_is_incomplete(client, model):
    response = client.responses.create(model=model, input=QUESTION, max_output_tokens=3)
    assert (response.status, response.output[0].status) == ("incomplete", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert ANSWER.startswith(response.output_text) and response.usage.output_tokens == 3


def test_a_conversation_in_items(client, model):
    first = client.responses.create(model=model, **FULL)
    again = {"role": "user", "content": [{"type": "input_text", "text": "And"}, {"type": "input_text", "text": "now?"}]}
    second = client.responses.create(
        model=model, instructions="Be brief.", input=[{"role": "user", "content": QUESTION}, *first.output, again]
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "And\nnow?"},
    ]
    assert second.usage.input_tokens == prompt_tokens(client, model, messages)
    assert second.instructions == "Be brief."
    chat = client.chat.completions.create(model=model, messages=messages)
    assert second.output_text == chat.choices[0].message.content


def test_a_stream_tells_all_there_is(client, model):
    events = list(client.responses.create(model=model, **FULL, stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert deltas > 3
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert kinds[-4] == "response.output_text.done" and events[-4].text == ANSWER
    begun, ended = events[0].response, events[-1].response
    assert (begun.status, begun.output, begun.usage) == ("in_progress", [], None)
    assert ended.output == [events[-2].item] and ended.output_text == ANSWER
    assert ended.usage.output_tokens == client.responses.create(model=model, **FULL).usage.output_tokens
    assert begun.id == ended.id


def test_the_clients_own_stream_follows_it(client, model):
    with client.responses.stream(model=model, **FULL) as stream:
        assert stream.get_final_response().output_text == ANSWER


def test_a_stream_that_is_cut(client, model):
    *_, item, last = client.responses.create(model=model, input=QUESTION, max_output_tokens=3, stream=True)
    assert (last.type, last.response.status, item.item.status) == ("response.incomplete", "incomplete", "incomplete")


def test_a_stream_without_text_has_an_empty_one(client, model):
    options = {"extra_body": {"stop": [ANSWER[:4]]}}
    whole = client.responses.create(model=model, **FULL, **options)
    *_, last = client.responses.create(model=model, **FULL, stream=True, **options)
    assert whole.output_text == last.response.output_text == ""
    assert len(whole.output) == len(last.response.output) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_spell_the_text(client, model, stream):
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    told = client.responses.create(model=model, **FULL, **options, stream=stream)
    if stream:
        events = list(told)
        told = events[-1].response
        deltas = [entry for event in events if event.type.endswith("text.delta") for entry in event.logprobs]
        assert "".join(entry.token for entry in deltas) == ANSWER
    logprobs = told.output[0].content[0].logprobs
    assert "".join(entry.token for entry in logprobs) == ANSWER
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].token == entry.token for entry in logprobs)


def test_a_schema_that_the_text_conforms_to(tool_client):
    schema = {"type": "json_schema", "name": "place", "schema": CITY, "strict": True}
    response = tool_client.responses.create(model="random", input="?", text={"format": schema})
    assert json.loads(response.output_text)["city"] in ("Bern", "Rom")
    assert response.text.format.schema_ == CITY
    parsed = tool_client.responses.parse(model="random", input="?", text_format=Place)
    assert parsed.output_parsed.city in ("Bern", "Rom")
    with tool_client.responses.stream(model="random", input="?", text_format=Place) as stream:
        assert stream.get_final_response().output_parsed.city in ("Bern", "Rom")


def test_our_own_fields(tool_client):
    own = {"guided_regex": "(yes|no)", "seed": 3, "top_k": 5, "cache_salt": "s"}
    assert tool_client.responses.create(model="random", input="?", extra_body=own).output_text in ("yes", "no")


def test_a_call_and_what_came_of_it(tool_client):
    response = tool_client.responses.create(**CALLING)
    (call,) = response.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Bern", "Rom")
    assert (response.output_text, response.status, response.tool_choice) == ("", "completed", "required")
    assert response.tools[0].name == "weather"

    output = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    asked = [{"role": "user", "content": "Rain in Bern?"}, call, output]
    final = tool_client.responses.create(model="random", input=asked, tools=[WEATHER], max_output_tokens=2)
    called = {"name": "weather", "arguments": call.arguments}
    messages = [
        {"role": "user", "content": "Rain in Bern?"},
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": called}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "It rains."},
    ]
    nested = {"type": "function", "function": {name: value for name, value in WEATHER.items() if name != "type"}}
    chat = tool_client.chat.completions.create(model="random", messages=messages, tools=[nested], max_tokens=2)
    assert final.usage.input_tokens == chat.usage.prompt_tokens


def test_a_stream_of_a_call(tool_client):
    events = list(tool_client.responses.create(**CALLING, stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    added, delta, done, item, last = events[2:]
    (call,) = tool_client.responses.create(**CALLING).output
    assert (added.item.status, added.item.arguments) == ("in_progress", "")
    assert delta.delta == done.arguments == item.item.arguments == call.arguments
    assert last.response.output == [item.item]
    with tool_client.responses.stream(**CALLING) as stream:
        assert stream.get_final_response().output[0].arguments == call.arguments


def test_text_around_calls_is_messages_of_its_own():
    call = SimpleNamespace(request_id="resp_1", service=SimpleNamespace(model_name="m"))
    calls = [ToolCall(f"call_{name}", name, "{}") for name in "ab"]
    request = Request("resp_1", messages=[])
    told = [("I ", []), ("see.", calls), (" Now", [])]
    reply = SimpleNamespace(
        deltas=[TokenDelta(None, 0, [], text, calls) for text, calls in told],
        completion=Completion(request, [Choice(text="I see. Now", tool_calls=calls, finish_reason="stop")], 1),
    )
    events = ResponseEvents(call, begin_response(call, {}), with_logprobs=False)
    lines = (events.take(0, reply) + events.finish([reply])).splitlines()
    data = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: ")]
    done = [event for event in data if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in done] == [0, 1, 2, 3]
    assert data[-1]["response"]["output"] == [event["item"] for event in done]
    assert [told_of(item) for item in data[-1]["response"]["output"]] == ["I see.", "a", "b", " Now"]
    whole = [told_of(item) for item in output_of(call, reply.completion.choices[0])]
    assert whole == ["I see. Now", "a", "b"]  # where between them it was is not known any more


def told_of(item):
    return item["name"] if item["type"] == "function_call" else item["content"][0]["text"]


def test_functions_are_called_by_name_or_not_at_all(tool_client):
    named = {**CALLING, "tool_choice": {"type": "function", "name": "weather"}}
    assert tool_client.responses.create(**named).output[0].name == "weather"
    response = tool_client.responses.create(**{**CALLING, "tool_choice": "none", "max_output_tokens": 3})
    assert [item.type for item in response.output] == ["message"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"store": True}, "store", "nothing is stored here: write false, or leave it out"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored here"),
        ({"conversation": "conv_1"}, "conversation", "nothing is stored here"),
        ({"background": True}, "background", "not available"),
        ({"truncation": "auto"}, "truncation", "too long is refused"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "should be a message, a function_call or"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "text": ""}]}]}, "input.0.content.0.type",
         "found 'input_image'"),
        ({"input": [{"role": "user", "content": "a", "contents": "b"}]}, "input.0.contents", "mean 'content'"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "d"}]}, "input.0.call_id",
         "no function_call"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "found 'web_search'"),
        ({"tool_choice": "required"}, "tool_choice", "without tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "found no schema"),
        ({"text": {"format": {"type": "json_object", "strct": True}}}, "text.format.strct", "mean 'strict'"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "text.format", "write one"),
        ({"top_logprobs": 2}, "top_logprobs", "include"),
        ({"max_tokens": 2}, "max_tokens", "did you mean"),
        ({"n": 2}, "n", "unknown field"),
        ({"stream_options": {}}, "stream_options", "needs stream"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(client, model, fields, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", body={"model": model, "input": "a", **fields}, cast_to=object)
    assert caught.value.param == param
    assert message in caught.value.message


def test_other_errors(client, model):
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="gpt-5", input="a")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.responses.create(model=model, input="word " * 5000, stream=True)


def test_a_failure_amid_a_stream_is_its_last_event(serve):
    with serve("operators.source.drain_timeout_s=0.01") as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        with client.responses.create(
            model="builtin:null", input="a", max_output_tokens=30000, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    server.drain()
                    break
            *_, item, last = stream
        assert (last.type, last.response.status, item.item.status) == ("response.failed", "failed", "incomplete")
        assert last.response.error.code == "server_error"
        assert last.response.output_text == item.item.content[0].text != ""
        client.close()


def test_async_calls_at_once(tiny_server, model):
    async def main():
        async with openai.AsyncOpenAI(base_url=tiny_server.url, api_key="none", max_retries=0) as client:
            texts = []

            async def ask(number):
                if number % 2:
                    texts.append((await client.responses.create(model=model, **FULL)).output_text)
                else:
                    async with client.responses.stream(model=model, **FULL) as stream:
                        texts.append((await stream.get_final_response()).output_text)

            async with anyio.create_task_group() as tasks:
                for number in range(8):
                    tasks.start_soon(ask, number)
            return texts

    assert anyio.run(main) == [ANSWER] * 8
