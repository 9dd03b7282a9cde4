"""Calls of a request's tools, through the whole pipeline: a model with random weights calls what it is made to call."""

from __future__ import annotations

import json
import shutil

import pytest

from sageLLM import GenerateRequest, SageLLMConfig, SageLLMEngine
from sageLLM.errors import RequestError

FORMS = {
    "hermes": "Call with <tool_call>.",
    "mistral": "[TOOL_CALLS]",  # a special token of the tokenizer, here
    "llama3_json": 'ipython {"name": a, "parameters": b}',
}
TEMPLATE = "{{{{ '{form}' }}}}{{{{ tools | tojson if tools }}}}{{{{ messages[0].content }}}}"
CITY = {"type": "object", "properties": {"city": {"enum": ["Bern", "Rom"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module", params=FORMS)
def engine(request, checkpoint_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    shutil.copytree(checkpoint_folder("qwen3"), folder)
    template = TEMPLATE.format(form=FORMS[request.param])
    for name, change in (
        ("config.json", lambda text: json.dumps({**json.loads(text), "max_position_embeddings": 2048})),
        ("tokenizer_config.json", lambda text: json.dumps({**json.loads(text), "chat_template": template})),
        ("tokenizer.json", lambda text: text.replace("<|user|>", "[TOOL_CALLS]")),
    ):
        (folder / name).write_text(change((folder / name).read_text()))
    config = SageLLMConfig(
        model={"model_id": str(folder)},
        kv_cache={"max_tokens": 4096},
        backend={"backend_type": "cpu", "threads": 1},
    )
    with SageLLMEngine(config) as running:
        assert running.services.tokenizer.tool_format.name == request.param
        yield running


def ask(**options):
    messages = [{"role": "user", "content": "Hi"}]
    return GenerateRequest(messages=messages, max_new_tokens=200, temperature=1.0, seed=3, tools=TOOLS, **options)


def arguments_fit(call):
    arguments = json.loads(call.arguments)
    return arguments == {} if call.name == "now" else arguments in ({"city": "Bern"}, {"city": "Rom"})


def test_a_call_that_is_required(engine):
    output = engine.generate(ask(tool_choice="required", parallel_tool_calls=False))
    (call,) = output.tool_calls
    assert (output.text, output.finish_reason) == ("", "stop")
    assert arguments_fit(call)


@pytest.mark.parametrize("name", ["weather", "now"])
def test_a_call_of_one_function(engine, name):
    output = engine.generate(ask(tool_choice={"type": "function", "function": {"name": name}}, n=2))
    for choice in output.choices:
        if choice.finish_reason == "stop":
            assert choice.text == ""
        assert {call.name for call in choice.tool_calls} == {name}
        assert all(map(arguments_fit, choice.tool_calls))


def test_where_the_model_decides_random_weights_call_nothing(engine):
    output = engine.generate(ask(tool_choice="auto"))
    assert output.tool_calls == []
    assert output.text == engine.services.tokenizer.for_tools.decode(output.output_tokens)


def test_tools_that_cannot_be_used(engine):
    with pytest.raises(RequestError, match="found tools and a regex to conform to"):
        engine.generate(ask(guided_regex="a"))
    with pytest.raises(RequestError, match="^tools: "):
        wrong = {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
        request = ask(tool_choice="required")
        request.tools = [wrong]
        engine.generate(request)
