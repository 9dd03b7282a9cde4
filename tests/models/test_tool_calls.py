"""Tool calls: told from the text around them, however it is cut; rendered by chat templates; forced by a grammar."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.errors import RequestError
from sageLLM.models.chat_template import ChatTemplate
from sageLLM.models.tool_calls import (
    ToolCallParser,
    detect_tool_format,
    forced_call_grammar,
    free_call_grammar,
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


CONTROLS = ["[TOOL_CALLS]", "<tool_call>", "<|python_tag|>", "<think>", "</think>", "<end>"]  # from token 256 on
CONTROL_IDS = {name: 256 + index for index, name in enumerate(CONTROLS)}
PIECES = [
    "<tool", "<tool_call>", "x<tool_call>\n", "</tool_call>", "[TOOL", "[TOOL_CALLS]", "<|python_tag|>", "[{",
    '{"name": "', '{"name": "add"', '"parameters": ', '"arguments": {}', ': "add"', '{"', "name", '"', "n\\u0061me",
    "get_weather", "}",
]  # fmt: skip
PIECE_BYTES = [*(piece.encode() for piece in PIECES), b"\xe4\xb8"]
TOKENS = [*(bytes([byte]) for byte in range(256)), *(b"\xff" + name.encode() for name in CONTROLS), *PIECE_BYTES]
END = CONTROL_IDS["<end>"]
MARKER_TOKENS = {CONTROL_IDS[each.opening] for each in (HERMES, LLAMA3_JSON, MISTRAL)}


@pytest.fixture(scope="module")
def tokenizer():
    """llguidance's, of bytes, control tokens and some longer pieces."""
    import llguidance

    class Tokens:
        eos_token_id, bos_token_id, unk_token_id = END, None, None
        tokens = TOKENS
        special_token_ids = [*CONTROL_IDS.values()]

        def __call__(self, text):
            return list(text.encode() if isinstance(text, str) else text)

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokens()))


@pytest.fixture(scope="module")
def matcher_of(tokenizer):
    """A grammar's matcher, before the first token."""
    from functools import cache

    import llguidance

    @cache
    def compiled(grammar):
        lark = llguidance.LLMatcher.grammar_from_lark(grammar)
        assert llguidance.LLMatcher.validate_grammar(lark, tokenizer) == ""
        return llguidance.LLMatcher(tokenizer, lark)

    return lambda grammar: compiled(grammar).deep_copy()


@pytest.fixture(scope="module")
def accepts(matcher_of):
    """Whether a grammar accepts a text, after the opening of Mistral's format as a token if `special`."""

    def check(grammar, text, special=False):
        matcher = matcher_of(grammar)
        tokens = [CONTROL_IDS["[TOOL_CALLS]"]] * special + list(text.encode())
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


STRICT_TOOLS = [
    {"type": "function", "function": {**TOOLS[0]["function"], "strict": True}},
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "required": ["unknown"]}}},
]
CONTROLS_OF = {
    "as tokens": CONTROL_IDS,
    "as text": {name: token for name, token in CONTROL_IDS.items() if token not in MARKER_TOKENS},
}
FORMATS = [HERMES, LLAMA3_JSON, MISTRAL]


def allowed_by(matcher):
    import numpy as np
    from llguidance.numpy import fill_next_token_bitmask

    bits = np.zeros((1, -(-len(TOKENS) // 32)), np.int32)
    fill_next_token_bitmask(matcher, bits)
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[: len(TOKENS)]).tolist()


def text_of(tokens, tool_format):
    """As detokenize has it: of control tokens only the format's markers are text."""
    return b"".join(
        TOKENS[token].removeprefix(b"\xff")
        for token in tokens
        if not TOKENS[token].startswith(b"\xff") or TOKENS[token][1:].decode() in tool_format.markers
    ).decode("utf-8", "replace")


def assert_free(matcher, tokens):
    """They may follow each other, and any may be the last."""
    for token in tokens:
        assert matcher.is_accepting()
        assert token in allowed_by(matcher)
        assert matcher.consume_token(token)
    assert matcher.is_accepting()


ORDINARY = [CONTROL_IDS["<think>"], CONTROL_IDS["</think>"]]
ORDINARY += [token for token, data in enumerate(TOKENS) if not {*data} & {*b"<[{\xff"}]


@pytest.mark.parametrize("controls", CONTROLS_OF)
@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
@settings(deadline=None, max_examples=25)
@given(tokens=st.lists(st.sampled_from(ORDINARY), max_size=20))
def test_where_the_model_decides_any_tokens_are_text(matcher_of, tool_format, controls, tokens):
    """Also control tokens and parts of characters, in any order."""
    assert_free(matcher_of(free_call_grammar(tool_format, STRICT_TOOLS, CONTROLS_OF[controls])), tokens)


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
@pytest.mark.parametrize(
    "text",
    [
        "a <b> [c] {d}", "<tool_cal", "<<tool_call", "[[TOOL_CALLS", "<|python_tag| >", "1 < 2\n\n", "[1, 2]",
        '{"city": "Bern"}', '{"name": "Anna", "parameters": {}}', ' {"name"', '{"tools": ["add"]}', "{{{",
        'Call it with {"name": "add", "arguments": {}}.', '```json\n{"name": "add", "parameters": {}}\n```',
    ],
)  # fmt: skip
def test_also_what_only_looks_like_a_call(matcher_of, tool_format, text):
    assert_free(matcher_of(free_call_grammar(tool_format, STRICT_TOOLS, CONTROL_IDS)), list(text.encode()))


def test_once_a_call_begins_it_is_one(accepts):
    """The opening decides, as a token of its own or spelled; in a bare format the name of a function does."""
    weather, add = call("get_weather", '{"city": "Bern"}'), call("add", '{"a": [1]}')
    hermes = free_call_grammar(HERMES, STRICT_TOOLS, {})
    text = f"I see.\n<tool_call>\n{weather}\n</tool_call>\n<tool_call>\n{add}\n</tool_call>"
    assert accepts(hermes, text)
    assert not accepts(hermes, text.replace("Bern", "Paris"))
    assert not accepts(hermes, f"{text} and then")
    assert not accepts(hermes, "I see <tool_call>.")
    single = free_call_grammar(HERMES, STRICT_TOOLS, {}, parallel=False)
    assert accepts(single, text.partition('\n<tool_call>\n{"name": "add')[0])
    assert not accepts(single, text)

    mistral = free_call_grammar(MISTRAL, STRICT_TOOLS, CONTROL_IDS)
    for special, opening in ((True, ""), (False, "Yes. [TOOL_CALLS]")):
        assert accepts(mistral, f"{opening}[{weather}, {add}]", special)
        assert not accepts(mistral, f"{opening}[{weather.replace('Bern', 'Paris')}]", special)
        assert not accepts(mistral, f"{opening} I call", special)

    llama = free_call_grammar(LLAMA3_JSON, STRICT_TOOLS, CONTROL_IDS)
    for opening in ("", " \n", "Yes. <|python_tag|>"):
        for city in ("Bern", "Paris"):
            made = call("get_weather", json.dumps({"city": city}), "parameters")
            assert accepts(llama, opening + made) is (city == "Bern")
    spaced = call("add", "{}", "parameters").replace("{", "{ ", 1)
    assert accepts(llama, spaced)
    for hidden in ("n\\u0061me", "\\u006Eame"):  # the parser would read it
        assert not accepts(llama, spaced.replace("name", hidden))
    assert not accepts(llama, '{"parameters": {}, "name": "add"}')


@pytest.mark.parametrize("controls", CONTROLS_OF)
@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_whatever_the_model_chooses_what_is_read_as_a_call_conforms(matcher_of, tool_format, controls, data):
    matcher = matcher_of(free_call_grammar(tool_format, STRICT_TOOLS, CONTROLS_OF[controls]))
    tokens: list[int] = []
    for _ in range(60):
        allowed = [token for token in allowed_by(matcher) if token != END]
        if not allowed:
            break
        long = [token for token in allowed if token >= 256] or allowed
        tokens.append(data.draw(st.sampled_from(allowed) | st.sampled_from(long)))
        assert matcher.consume_token(tokens[-1])
    text = b"".join(
        TOKENS[token].removeprefix(b"\xff")
        for token in tokens
        if not TOKENS[token].startswith(b"\xff") or TOKENS[token][1:].decode() in tool_format.markers
    ).decode("utf-8", "replace")  # of control tokens only the format's own are text
    for name, arguments in parse(tool_format, text)[1]:
        assert name == "add" or json.loads(arguments) in ({"city": "Bern"}, {"city": "Zürich"})
