"""Calls of a request's tools, through the whole pipeline: a model with random weights calls what it is made to call."""

from __future__ import annotations

import json
import shutil

import pytest

from sageLLM import GenerateRequest, SageLLMConfig, SageLLMEngine
from sageLLM.errors import RequestError

FORMS = {
    "hermes": "Call with <tool_call>.",
    "mistral": "[TOOL_CALLS]",
    "llama3_json": 'ipython {"name": a, "parameters": b}',
}
OPENINGS = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama3_json": "<|python_tag|>"}
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
        ("tokenizer.json", lambda text: text.replace("<|user|>", OPENINGS[request.param])),  # a token of its own
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
    usual = {"max_new_tokens": 200, "temperature": 1.0, "seed": 3, "tools": TOOLS}
    return GenerateRequest(messages=messages, **usual | options)


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


def strict(tools):
    return [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in tools]


def test_strict_tools_leave_an_answer_as_it_is(engine):
    """Random weights write parts of characters, too; the byte 0xff is the only text that is kept out."""
    tokenizer = engine.services.tokenizer
    byte = next(token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) == b"\xff")
    options = {"n": 4, "logit_bias": dict.fromkeys([byte, *tokenizer.control_ids.values()], -100.0)}
    plain, free = (engine.generate(ask(**options, tools=tools)) for tools in (TOOLS, strict(TOOLS)))
    assert [each.output_tokens for each in free.choices] == [each.output_tokens for each in plain.choices]


@pytest.mark.parametrize("parallel", [True, False])
def test_once_the_model_begins_a_call_its_arguments_conform(engine, parallel):
    """It is made to begin with the opening, and goes on as it likes."""
    name = engine.services.tokenizer.tool_format.name
    token = engine.services.tokenizer.control_ids[OPENINGS[name]]
    output = engine.generate(
        ask(tools=strict(TOOLS), parallel_tool_calls=parallel, logit_bias={token: 100.0}, temperature=0.0)
    )
    assert output.output_tokens[0] == token
    assert output.text == ""
    assert output.tool_calls
    assert all(map(arguments_fit, output.tool_calls))
    if not parallel or name == "llama3_json":
        assert (len(output.tool_calls), output.finish_reason) == (1, "stop")


def test_an_answer_of_a_form_or_a_call(engine):
    """The model decides between both with its first token."""
    tool_format = engine.services.tokenizer.tool_format
    schema = {"type": "object", "properties": {"rain": {"type": "boolean"}}, "required": ["rain"],
              "additionalProperties": False}  # fmt: skip
    wanted = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}, "tools": strict(TOOLS)}
    token = engine.services.tokenizer.control_ids[OPENINGS[tool_format.name]]
    if tool_format.bare:
        with pytest.raises(RequestError, match="calls are JSON as its answers are: write one"):
            engine.generate(ask(**wanted))
        return
    answered, called = (engine.generate(ask(**wanted, logit_bias={token: bias})) for bias in (-100.0, 100.0))
    assert answered.tool_calls == []
    assert json.loads(answered.text)["rain"] in (True, False)
    assert called.text == ""
    assert called.tool_calls
    assert all(map(arguments_fit, called.tool_calls))
    forced = engine.generate(ask(**wanted, tool_choice="required", parallel_tool_calls=False))
    assert (forced.text, len(forced.tool_calls)) == ("", 1)


def test_tools_that_cannot_be_used(engine):
    with pytest.raises(RequestError, match="found tools and a regex to conform to"):
        engine.generate(ask(guided_regex="a"))
    with pytest.raises(RequestError, match="^tools: "):
        wrong = {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
        request = ask(tool_choice="required")
        request.tools = [wrong]
        engine.generate(request)
