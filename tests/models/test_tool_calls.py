"""Tool calls: told from the text around them, however it is cut; rendered by chat templates; forced by a grammar."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sageLLM.errors import RequestError
from sageLLM.models.chat_template import ChatTemplate
from sageLLM.models.tool_calls import (
    ToolCallParser,
    detect_tool_format,
    forced_call_grammar,
    to_template_messages,
)
from sageLLM.models.tool_calls.formats import HERMES, LLAMA3_JSON, MISTRAL

NAMES = ("get_weather", "add")
WEATHER = '{"name": "get_weather", "arguments": {"city": "Zürich"}}'
ADD = '{"name": "add", "parameters": {"a": 1, "b": [2.5, {"c": null}]}}'
PARIS = ("get_weather", '{"city": "Zürich"}')
SUM = ("add", '{"a": 1, "b": [2.5, {"c": null}]}')


def parse(tool_format, *pieces, **options):
    """Content and calls, from all that was pushed."""
    parser = ToolCallParser(tool_format, NAMES, **options)
    parsed = [*(parser.push(piece) for piece in pieces), parser.finish()]
    content = "".join(each.content for each in parsed)
    calls = [call for each in parsed for call in each.calls]
    assert (parser.content, parser.calls) == (content, calls)
    return content, [(call.name, call.arguments) for call in calls]


CALLS = [
    (HERMES, f"<tool_call>\n{WEATHER}\n</tool_call>", "", [PARIS]),
    (HERMES, f"I see.\n<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>{ADD}</tool_call>\n", "I see.", [PARIS, SUM]),
    (HERMES, f"<tool_call>{WEATHER}</tool_call> and then", " and then", [PARIS]),
    (HERMES, f"<tool_call>{WEATHER}", "", [PARIS]),  # ended by a stop token
    (HERMES, f"<tool_call>{WEATHER}\n</tool", "", [PARIS]),  # or cut
    (HERMES, f"a <tool_call> b <tool_call>{ADD}</tool_call>", "a <tool_call> b", [SUM]),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": "}</tool_call>\\"{"}}</tool_call>', "",
     [("add", '{"a": "}</tool_call>\\"{"}')]),
    (LLAMA3_JSON, ADD, "", [SUM]),
    (LLAMA3_JSON, f"\n<|python_tag|>{ADD}", "", [SUM]),
    (LLAMA3_JSON, f"{ADD}; {WEATHER}", "", [SUM, PARIS]),
    (LLAMA3_JSON, f"{ADD}\n{WEATHER}\n", "", [SUM, PARIS]),
    (LLAMA3_JSON, '{"type": "function", "name": "add", "parameters": {}}', "", [("add", "{}")]),
    (LLAMA3_JSON, f"I call <|python_tag|>{ADD}", "I call", [SUM]),
    (MISTRAL, f"[TOOL_CALLS] [{WEATHER}, {ADD}]", "", [PARIS, SUM]),
    (MISTRAL, f"Yes. [TOOL_CALLS][{WEATHER}]", "Yes.", [PARIS]),
    (MISTRAL, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": "]"}, "id": "abcdefghi"}] done', " done",
     [("add", '{"a": "]"}')]),
]  # fmt: skip

NO_CALLS = [
    (HERMES, "Nothing to see. \n"),
    (HERMES, " "),
    (HERMES, "a < b and <tool_call is no tag, nor is <tool_call"),
    (HERMES, "<tool_call>"),
    (HERMES, "<tool_call>\n{} </tool_call>"),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": ["add"], "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "arguments": "{}"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "arguments": {}, "parameters": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1}]</tool_call>'),
    (HERMES, f"<tool_call>{WEATHER} that was it</tool_call>"),
    (HERMES, f"<tool_call>{WEATHER[:-1]}"),
    (HERMES, '<tool_call>{"a":' + "[" * 5000),
    (HERMES, WEATHER),
    (LLAMA3_JSON, '{"name": "Alice", "age": 3}\n'),
    (LLAMA3_JSON, '{"name": "Alice", "parameters": {}}'),
    (LLAMA3_JSON, f"{ADD} is how you call it"),
    (LLAMA3_JSON, f"Call it with {ADD}"),
    (LLAMA3_JSON, "<|python_tag|>print(1)"),
    (LLAMA3_JSON, '  {"name": '),
    (MISTRAL, "[TOOL_CALLS] []"),
    (MISTRAL, f"[TOOL_CALLS] {WEATHER}"),
    (MISTRAL, f'[TOOL_CALLS] [{WEATHER}, {{"name": "unknown", "arguments": {{}}}}]'),
    (MISTRAL, f"[TOOL_CALLS] [{WEATHER}"),
    (MISTRAL, f"[TOOL_CALL [{WEATHER}]"),
]


@pytest.mark.parametrize(("tool_format", "text", "content", "calls"), CALLS)
def test_calls_are_told_from_the_text_around_them(tool_format, text, content, calls):
    assert parse(tool_format, text) == (content, calls)
    assert parse(tool_format, *text) == (content, calls)


@pytest.mark.parametrize(("tool_format", "text"), NO_CALLS)
def test_what_only_looks_like_a_call_is_content_unchanged(tool_format, text):
    assert parse(tool_format, text) == (text, [])
    assert parse(tool_format, *text) == (text, [])


FORMATS = st.sampled_from([HERMES, LLAMA3_JSON, MISTRAL])
PARTS = st.sampled_from([
    "<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[TOOL", "<|python_tag|>", "<|py", ";", "[", "]", ",", "{",
    "}", '"', "\\", " ", "\n", "Hello", WEATHER, ADD, f"[{ADD}]", f"<tool_call>{ADD}</tool_call>",
    f"[TOOL_CALLS][{ADD}]",
])  # fmt: skip


@given(tool_format=FORMATS, parts=st.lists(PARTS | st.text(max_size=3), max_size=12), data=st.data())
def test_any_cut_gives_the_same(tool_format, parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(tool_format, text)
    assert parse(tool_format, *pieces) == whole
    if not whole[1]:
        assert whole[0] == text


def test_content_comes_as_soon_as_it_is_certain():
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.push("Wait <").content == "Wait"
    assert parser.push("b>\n").content == " <b>"
    assert parser.push("<tool_call>").content == ""
    assert parser.push(WEATHER) == ("", [])
    (call,) = parser.push("</tool_call>").calls
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Zürich"})
    assert parser.push("\n") == ("", [])
    assert parser.finish() == ("", [])


def test_every_call_has_an_id_of_its_own():
    parser = ToolCallParser(HERMES, NAMES)
    first, second = parser.push(f"<tool_call>{ADD}</tool_call>" * 2).calls
    assert first.id != second.id
    assert first.id.startswith("call_")
    (call,) = ToolCallParser(MISTRAL, NAMES).push(f"[TOOL_CALLS][{ADD}]").calls
    assert len(call.id) == 9  # as its template demands
    assert call.id.isalnum()


def test_calls_beyond_those_that_are_wanted_are_dropped():
    text = f"<tool_call>{ADD}</tool_call>\n<tool_call>{WEATHER}</tool_call>"
    assert parse(HERMES, text, max_calls=1) == parse(HERMES, *text, max_calls=1) == ("", [SUM])


# Excerpts, in our words, of what templates of each kind say.
QWEN = """\
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}
{%- for message in messages %}
{{- "\n<" + message.role + ">" + message.content }}
{%- for call in message.tool_calls or [] %}
{%- set called = call.function %}
{{- '\n<tool_call>{"name": "' + called.name + '", ' }}"arguments": {{ called.arguments | tojson }}}</tool_call>
{%- endfor %}
{%- if message.role == "tool" %} of {{ message.name }}{% endif %}
{%- endfor %}"""
LLAMA = """\
{%- if not tools is defined %}{% set tools = none %}{% endif %}Environment: ipython
{% if tools is not none %}Respond with {"name": function, "parameters": arguments}{{ tools | tojson }}{% endif %}"""


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN, HERMES),
        (LLAMA, LLAMA3_JSON),
        ("{{ '[TOOL_CALLS] [' }}", MISTRAL),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", None),
        ("<tool_call><function=f><parameter=x>", None),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", None),
    ],
)
def test_the_format_is_what_the_template_teaches(template, expected):
    assert detect_tool_format(template) is expected


@pytest.mark.parametrize(
    ("template", "takes"), [(QWEN, True), (LLAMA, True), ("{# no tools #}{{ messages[0].content }}", False)]
)
def test_a_template_takes_tools_if_it_reads_them(template, takes):
    assert ChatTemplate(template, {}).takes_tools is takes


CONVERSATION = [
    {"role": "user", "content": "Weather?", "tool_calls": None},
    {"role": "assistant", "content": None, "refusal": None,
     "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
                    {"id": "c2", "type": "function", "function": {"name": "now", "arguments": ""}}]},
    {"role": "tool", "tool_call_id": "c2", "content": "noon"},
]  # fmt: skip


def test_a_conversation_with_calls_is_rendered():
    text = ChatTemplate(QWEN, {}).render(to_template_messages(CONVERSATION), tools=[{"function": {"name": "add"}}])
    lines = text.split("\n")
    assert lines[0] == '<tools>{"function": {"name": "add"}}</tools>'
    assert lines[2:] == [
        "<user>Weather?",
        "<assistant>",
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
        "<tool>noon of now",
    ]
    assert CONVERSATION[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}', "the request's own was changed"


@pytest.mark.parametrize("arguments", ["{", "[1]", None])
def test_arguments_that_are_no_object(arguments):
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    with pytest.raises(RequestError, match=r"messages.0.tool_calls.0.function.arguments: (not JSON|found)"):
        to_template_messages([message])


TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "properties": {"city": {"$ref": "#/$defs/c"}}, "required": ["city"],
        "additionalProperties": False, "$defs": {"c": {"enum": ["Zürich", "Bern"]}}}}},
    {"type": "function", "function": {"name": "add"}},
]  # fmt: skip


def call(name, arguments, key="arguments"):
    return f'{{"name": "{name}", "{key}": {arguments}}}'


@pytest.fixture(scope="module")
def accepts():
    """Whether a grammar accepts a text, over a tokenizer of bytes whose token 256 is special."""
    import llguidance

    class Bytes:
        eos_token_id, bos_token_id, unk_token_id = 257, None, None
        tokens = [bytes([byte]) for byte in range(256)] + [b"\xff[TOOL_CALLS]", b"\xff<end>"]
        special_token_ids = [256, 257]

        def __call__(self, text):
            return list(text.encode() if isinstance(text, str) else text)

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))

    def check(grammar, text, special=False):
        lark = llguidance.LLMatcher.grammar_from_lark(grammar)
        assert llguidance.LLMatcher.validate_grammar(lark, tokenizer) == ""
        matcher = llguidance.LLMatcher(tokenizer, lark)
        tokens = [256] * special + list(text.encode())
        whole = matcher.validate_tokens(tokens) == len(tokens)
        return whole and matcher.consume_tokens(tokens) and matcher.is_accepting()

    return check


def test_a_forced_call_is_what_its_own_parser_reads(accepts):
    weather, add = call("get_weather", '{"city": "Bern"}'), call("add", "{}")
    grammar = forced_call_grammar(HERMES, TOOLS, {})
    text = f"<tool_call>\n{weather}\n</tool_call>\n<tool_call>\n{add}\n</tool_call>"
    assert accepts(grammar, text)
    assert parse(HERMES, text) == ("", [("get_weather", '{"city": "Bern"}'), ("add", "{}")])
    assert not accepts(grammar, "Hello")
    assert not accepts(grammar, text.replace(": ", ":   "))  # weak models would write nothing but spaces
    assert not accepts(grammar, f"<tool_call>\n{call('get_weather', '{}')}\n</tool_call>")
    assert not accepts(grammar, f"<tool_call>\n{call('sub', '{}')}\n</tool_call>")


def test_only_one_call_or_only_of_one_function(accepts):
    one = "<tool_call>\n{}\n</tool_call>".format
    add, weather = one(call("add", "{}")), one(call("get_weather", '{"city": "Bern"}'))
    single = forced_call_grammar(HERMES, TOOLS, {}, parallel=False)
    assert accepts(single, add)
    assert not accepts(single, f"{add}\n{add}")
    named = forced_call_grammar(HERMES, TOOLS, {}, name="add")
    assert accepts(named, add)
    assert not accepts(named, weather)


def test_forced_calls_of_the_other_formats(accepts):
    llama = forced_call_grammar(LLAMA3_JSON, TOOLS, {})
    assert accepts(llama, call("add", "{}", "parameters"))
    assert not accepts(llama, call("add", "{}"))
    mistral = forced_call_grammar(MISTRAL, TOOLS, {"[TOOL_CALLS]": 256})
    calls = f"[{call('add', '{}')}, {call('add', '{}')}]"
    assert accepts(mistral, calls, special=True)
    assert accepts(mistral, f" {calls}", special=True)
    assert not accepts(mistral, calls)
    assert not accepts(forced_call_grammar(MISTRAL, TOOLS, {"[TOOL_CALLS]": 256}, parallel=False), calls, special=True)
