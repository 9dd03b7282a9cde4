"""http_source: calls of tools, and outputs that conform to a form, with the `openai` package."""

from __future__ import annotations

import json
import shutil

import openai
import pytest

from .conftest import serving

TEMPLATE = "{{ 'Call with <tool_call>.' }}{{ tools | tojson if tools }}{{ messages[0].content }}"
CITY = {"type": "object", "properties": {"city": {"enum": ["Bern", "Rom"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}}]
ASK = {"messages": [{"role": "user", "content": "Rain in Bern?"}], "max_tokens": 200, "seed": 1}
ONE = {**ASK, "tools": TOOLS, "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def client(checkpoint_folder, tmp_path_factory):
    """A client of a model with random weights, whose template knows tools."""
    folder = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(checkpoint_folder("qwen3"), folder)
    for name, changes in (
        ("config.json", {"max_position_embeddings": 2048}),
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
    ):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    settings = ["operators.source.model_name=random", "engine.kv_cache.max_tokens=4096"]
    with (
        serving(f"model={folder}", *settings, "engine.backend.backend_type=cpu") as server,
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
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
