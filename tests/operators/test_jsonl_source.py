"""jsonl_source: a file of JSON lines becomes requests; what is no request becomes a dead letter."""

from __future__ import annotations

import json
import os

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.config import Config
from sageLLM.errors import ConfigError, RequestError, SourceChangedError
from sageLLM.operators.sources.jsonl_source import JsonlSource
from sageLLM.operators.sources.lines import LineSplitter
from sageLLM.operators.sources.request_format import parse_request
from sageLLM.records import Pooling, SamplingParams, ToolChoice
from sageLLM.runtime.flow.resume import LineSet, ResumeIndex


@pytest.fixture
def read(drive, tmp_path):
    """Write bytes to in.jsonl, read them with the source."""

    def run(data: bytes | str, context=None, **config):
        (tmp_path / "in.jsonl").write_bytes(data.encode() if isinstance(data, str) else data)
        return drive(JsonlSource, {"path": "in.jsonl", **config}, context=context)

    return run


def test_each_line_becomes_a_request_that_knows_where_it_stood(read):
    out = read('{"prompt": "one"}\n{"id": "b", "prompt_tokens": [5, 6]}\n')
    first, second = out.sent
    assert (first.request_id, first.prompt) == ("line-1", "one")
    assert (second.request_id, second.prompt_tokens) == ("b", [5, 6])
    assert (second.src.file, second.src.line, second.src.offset) == ("in.jsonl", 2, 18)
    assert first.src.fingerprint == second.src.fingerprint != ""
    assert not first.interactive
    assert out.letters == []


def test_blank_lines_crlf_a_byte_order_mark_and_a_missing_last_newline_are_no_errors(read):
    out = read(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}')
    assert [(r.prompt, r.src.line) for r in out.sent] == [("a", 1), ("b", 4)]
    assert out.letters == []


def test_a_bad_line_is_a_dead_letter_and_the_stream_goes_on(read):
    out = read(b'{"prompt": "a"}\n{"prompt": \n{"prompt": "\xff"}\n{"prompt": "b"}\n')
    assert [r.prompt for r in out.sent] == ["a", "b"]
    broken, not_utf8 = out.letters
    assert broken.error.startswith("not JSON: EOF while parsing")
    assert (broken.src.line, broken.raw) == (2, '{"prompt": ')
    assert not_utf8.error == "not UTF-8: byte 0xff at column 13"
    assert not_utf8.raw == '{"prompt": "\\xff"}'


def test_an_oversize_line_is_not_kept_but_counted(read):
    long = json.dumps({"prompt": "x" * 600_000})
    out = read(f'{{"prompt": "a"}}\n{long}\n{{"prompt": "b"}}\n', max_line_bytes=1000)
    assert [(r.prompt, r.src.line) for r in out.sent] == [("a", 1), ("b", 3)]
    (letter,) = out.letters
    assert letter.error == f"the line has {len(long)} bytes, max_line_bytes is 1000"
    assert letter.raw.endswith(f"xxx... ({len(long)} bytes)")
    assert len(letter.raw) < 2100


def test_lists_hold_at_most_batch_size_requests(read):
    out = read('{"prompt": "a"}\n' * 150, batch_size=64)
    assert out.lists == [64, 64, 22]


def test_the_file_must_exist_and_be_a_file(drive, tmp_path):
    with pytest.raises(ConfigError, match=r"nosuch\.jsonl: cannot be read: No such file"):
        drive(JsonlSource, {"path": "nosuch.jsonl"})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="stdin_source"):
        drive(JsonlSource, {"path": "pipe"})


# What earlier runs finished


def finished(read, data, lines, file="in.jsonl", fingerprint=None):
    index = ResumeIndex()
    fingerprint = fingerprint or read(data).sent[0].src.fingerprint
    for line in lines:
        index.entry(file, fingerprint).lines.add(line)
    index.entry(file, fingerprint).outputs.add("out.jsonl")
    return index


def test_finished_lines_are_not_read_again(read, make_context):
    data = '{"prompt": "a"}\n' * 5
    out = read(data, make_context(resume=finished(read, data, [1, 3, 4])))
    assert [r.src.line for r in out.sent] == [2, 5]


def test_a_changed_file_is_refused(read, make_context):
    before = '{"prompt": "a"}\n{"prompt": "b"}\n'
    index = finished(read, before, [1])
    with pytest.raises(SourceChangedError, match=r"in\.jsonl: has changed since out\.jsonl was begun"):
        read(before.replace("b", "c"), make_context(resume=index))
    with pytest.raises(SourceChangedError, match="has grown from 32 to 48 bytes"):
        read(before + '{"prompt": "d"}\n', make_context(resume=index))


def test_a_renamed_file_is_known_again_a_copy_is_another_file(read, make_context, tmp_path):
    data = '{"prompt": "a"}\n' * 3
    index = finished(read, data, [1, 2], file="before.jsonl")
    assert [r.src.line for r in read(data, make_context(resume=index)).sent] == [3]
    index = finished(read, data, [1, 2], file="before.jsonl")
    (tmp_path / "before.jsonl").write_text(data)
    assert [r.src.line for r in read(data, make_context(resume=index)).sent] == [1, 2, 3]


def test_another_way_to_write_the_path_is_the_same_file(drive, read, make_context, tmp_path):
    data = '{"prompt": "a"}\n' * 3
    context = make_context(resume=finished(read, data, [1, 2]))
    out = drive(JsonlSource, {"path": str(tmp_path / "in.jsonl")}, context=context)
    assert [r.src.line for r in out.sent] == [3]


def test_a_file_that_changes_while_it_is_read_is_refused(read, tmp_path, drive, outlet):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' * 40_000)

    class Meddler(outlet):
        async def send(self, records, port="out"):
            os.truncate(tmp_path / "in.jsonl", 100_000)

    with pytest.raises(SourceChangedError, match="changed while it was read"):
        drive(JsonlSource, {"path": "in.jsonl"}, outlet=Meddler())


def test_a_restarted_source_goes_on_behind_the_last_line_it_sent(make_context, outlet, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' * 10)

    class Failing(outlet):
        async def send(self, records, port="out"):
            await super().send(records)
            if len(self.sent) == 6:
                raise OSError("the disk is gone")

    async def main():
        context, out = make_context(), Failing()
        config = JsonlSource.config_model(path="in.jsonl", batch_size=2)
        failing, following = JsonlSource(config, context), JsonlSource(config, context)
        await failing.open()
        with pytest.raises(OSError):
            await failing.run(None, out)
        await failing.close()
        await following.open()
        await following.run(None, out)
        await following.close()
        assert [r.src.line for r in out.sent] == list(range(1, 11))

    anyio.run(main)


# The request format


def parse(**fields):
    return parse_request(json.dumps(fields).encode(), "line-1")


def refuse(**fields):
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    return str(caught.value)


def test_every_sampling_parameter_is_accepted():
    given_ = {
        "max_new_tokens": 7, "min_tokens": 1, "temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1,
        "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": -0.3, "logit_bias": {"12": 3.0},
        "seed": 11, "stop": ["a", "b"], "stop_token_ids": [9], "ignore_eos": True, "n": 2, "logprobs": 3,
        "prompt_logprobs": 1,
    }  # fmt: skip
    sampling = parse(prompt="x", **given_).sampling
    expected = {**given_, "logit_bias": {12: 3.0}, "stop": ("a", "b"), "stop_token_ids": (9,)}
    assert sampling == SamplingParams(**expected)
    assert set(given_) == set(SamplingParams.__dataclass_fields__), "a new parameter belongs into the request format"


def test_the_other_fields():
    request = parse(
        messages=[{"role": "user", "content": "hi", "name": "bo"}],
        id=17, stop="END", tenant="acme", cache_salt="s", priority=-2, stream=True, max_tokens=3, seed=None,
        deadline_ms=1500,
    )  # fmt: skip
    assert request.messages == [{"role": "user", "content": "hi", "name": "bo"}]
    assert (request.request_id, request.sampling.stop, request.sampling.max_new_tokens) == ("17", ("END",), 3)
    assert (request.tenant, request.cache_salt, request.priority, request.stream) == ("acme", "s", -2, True)
    assert request.deadline_ms == 1500


@pytest.mark.parametrize("pooling", Pooling)
def test_a_request_for_an_embedding(pooling):
    request = parse(prompt="a", pooling=pooling.value, tenant="acme", stream=False, n=None)
    assert (request.pooling, request.tenant, request.sampling) == (pooling, "acme", SamplingParams())
    assert refuse(prompt="a", pooling="max") == "pooling: found 'max', should be 'mean' or 'last'"
    assert refuse(prompt="a", pooling="mean", stream=True, temperature=0.0, max_tokens=1).startswith(
        "found pooling and max_tokens, stream, temperature: an embedding has no output to shape"
    )
    assert refuse(messages=[{"role": "user", "content": "a"}], pooling="mean").startswith(
        "found pooling and messages: write prompt or prompt_tokens"
    )


def test_text_parts_of_a_message_are_joined():
    request = parse(messages=[{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}])
    assert request.messages == [{"role": "user", "content": "a\nb"}]


def test_an_assistant_that_calls_tools_need_not_say_anything():
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    messages = [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    assert parse(messages=messages).messages == messages


ADD = {"type": "function", "function": {"name": "add", "description": None, "parameters": {"type": "object"}}}
CHAT = [{"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize(
    ("fields", "choice"),
    [
        ({}, ToolChoice()),
        ({"tool_choice": "auto", "parallel_tool_calls": True}, ToolChoice()),
        ({"tool_choice": "required"}, ToolChoice(required=True)),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ToolChoice(parallel=False)),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, ToolChoice(required=True, name="add")),
    ],
)
def test_tools_and_how_they_are_to_be_used(fields, choice):
    line = {"messages": CHAT, "tools": [ADD], **fields}
    for request in (parse(**line), parse(**batch(line))):
        assert request.tools == [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
        assert request.tool_choice == choice


@pytest.mark.parametrize("fields", [{"tools": []}, {"tools": [ADD], "tool_choice": "none"}, {"tool_choice": "auto"}])
def test_a_request_that_calls_no_tools(fields):
    request = parse(messages=CHAT, **fields)
    assert (request.tools, request.tool_choice) == (None, ToolChoice())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "always"}, "tool_choice: found 'always', should be 'none', 'auto' or 'required' or an object"),
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "no tool 'sub': write one of add"),
        ({"tools": [ADD, ADD]}, "tools: found two functions 'add'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: found 'web_search', should be 'function'; missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name: found 'a b'"),
        ({"tools": [{"type": "function", "function": {"name": "a", "paramters": {}}}]}, "did you mean 'parameters'?"),
        ({"tools": None, "tool_choice": "required"}, "found tool_choice without tools"),
        ({"messages": None, "prompt": "1+1?"}, "found tools without messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "missing field 'messages.0.tool_calls.0."),
    ],
)
def test_tools_that_are_wrong(fields, message):
    assert message in refuse(**{"messages": CHAT, "tools": [ADD], **fields})


def test_an_unknown_field_names_the_nearest():
    assert refuse(prompt="a", max_tokns=3) == "unknown field 'max_tokns': did you mean 'max_tokens'?"
    assert refuse(prompt="a", zzz=1).startswith("unknown field 'zzz': known are cache_salt, ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "found no prompt: write one of prompt, messages, prompt_tokens"),
        ({"prompt": "a", "prompt_tokens": [1]}, "found prompt and prompt_tokens: write one of"),
        ({"prompt": 1}, "prompt: found 1, should be a valid string"),
        ({"prompt": "a", "max_new_tokens": "8"}, "max_new_tokens: found '8', should be a valid integer"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens: found 0, should be greater than or equal to 1"),
        ({"prompt": "a", "max_tokens": 1, "max_new_tokens": 1}, "found max_new_tokens and max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature: found -1, should be greater than or equal to 0"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature: found nan, should be a finite number"),
        ({"prompt": "a", "top_p": 0}, "top_p: found 0, should be greater than 0"),
        ({"prompt": "a", "n": 0}, "n: found 0, should be greater than or equal to 1"),
        ({"prompt": "a", "n": True}, "n: found True, should be a valid integer"),
        ({"prompt": "a", "stop": 3}, "stop: found 3, should be a valid string or a valid array"),
        ({"prompt": "a", "stop": [""]}, "stop.0: found '', but string should have at least 1 character"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias.x: found 'x', should be a valid integer"),
        ({"prompt": "a", "min_tokens": 9, "max_tokens": 3}, "min_tokens 9 is more than max_new_tokens 3"),
        ({"prompt_tokens": [1, -1]}, "prompt_tokens.1: found -1, should be greater than or equal to 0"),
        ({"prompt_tokens": []}, "prompt_tokens: found [], but list should have at least 1 item"),
        ({"messages": [{"content": "a"}]}, "missing field 'messages.0.role'"),
        (
            {"messages": [{"role": "wizard", "content": "a"}]},
            "messages.0.role: found 'wizard', should be 'system', 'developer', 'user', 'assistant' or 'tool'",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0: a message of user has no content: write a text"),
        ({"messages": [{"role": "tool", "content": None}]}, "messages.0: a message of tool has no content"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "messages.1: a message of assistant"),
    ],
)
def test_what_is_wrong_and_what_to_write_instead(fields, message):
    assert message in refuse(**fields)


def test_all_wrong_fields_are_named_at_once():
    assert refuse(prompt="a", n=0, top_p=2).count(";") == 1


def batch(body, **fields):
    return {"custom_id": "c1", "method": "POST", "url": "/v1/chat/completions", "body": body, **fields}


def test_openai_batch_lines_of_chat():
    body = {
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 5, "temperature": 0,
        "stop": "x", "logprobs": True, "top_logprobs": 2, "logit_bias": {"7": -100}, "user": "u", "n": 2, "seed": 1,
    }  # fmt: skip
    request = parse(**batch(body))
    assert (request.request_id, request.messages) == ("c1", body["messages"])
    assert request.sampling == SamplingParams(
        max_new_tokens=5, temperature=0.0, stop=("x",), logprobs=2, logit_bias={7: -100.0}, n=2, seed=1
    )


def test_openai_batch_lines_of_text_completions():
    body = {"model": "m", "prompt": 'say "body"', "max_tokens": 5, "logprobs": 0}
    request = parse(**batch(body, url="/v1/completions"))
    assert (request.prompt, request.sampling.logprobs) == ('say "body"', 0)
    assert parse(custom_id="c", body={"prompt": [3, 4]}).prompt_tokens == [3, 4]


def test_batch_lines_that_are_wrong():
    assert refuse(body={"prompt": "a"}) == "missing field 'custom_id'"
    assert refuse(custom_id="c", body={"prompt": "a", "max_tokn": 1}).endswith("did you mean 'max_tokens'?")
    assert refuse(custom_id="c", metod="POST", body={"prompt": "a"}).endswith("did you mean 'method'?")
    assert refuse(**batch({"prompt": "a"})).startswith("url /v1/chat/completions takes body.messages")
    assert refuse(custom_id="c", body={"prompt": "a", "top_logprobs": 1}).endswith("top_logprobs needs logprobs: true")
    image = [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]
    assert "should be 'text'" in refuse(**batch({"messages": image}))


NO_OPS = {
    "response_format": {"type": "text"}, "metadata": {"run": "7"}, "tools": [], "tool_choice": "auto", "store": True,
    "parallel_tool_calls": False, "functions": [], "echo": False, "best_of": 1, "modalities": ["text"], "user": "u",
    "service_tier": "default", "safety_identifier": "s", "prompt_cache_key": "k", "model": "m", "stream": False,
    "suffix": "", "verbosity": "medium", "prompt_cache_retention": "24h", "top_logprobs": 0,
    "skip_special_tokens": True, "use_beam_search": False, "length_penalty": 1.0, "chat_template_kwargs": {},
}  # fmt: skip
NULLS = ["stream_options", "suffix", "audio", "prediction", "logit_bias", "stop", "seed", "top_logprobs", *NO_OPS]


def test_foreign_fields_that_change_nothing_are_accepted():
    plain = parse(custom_id="c", body={"prompt": "a"})
    for fields in (NO_OPS, dict.fromkeys(NULLS)):
        request = parse(custom_id="c", body={"prompt": "a", **fields})
        assert (request.prompt, request.sampling, request.stream) == ("a", plain.sampling, False)


@pytest.mark.parametrize(
    ("field", "value", "instead"),
    [
        ("stream_options", {"include_usage": True}, "leave it out"),
        ("echo", True, "prompt_logprobs are there"),
        ("best_of", 3, "write n, and choose"),
        ("best_of", True, "write n, and choose"),
        ("suffix", "end", "leave it out"),
        ("service_tier", "flex", "write auto"),
        ("functions", [{"name": "f"}], "write tools"),
        ("reasoning_effort", "low", "write chat_template_kwargs"),
        ("skip_special_tokens", False, "write true"),
        ("guided_json", {"type": "object"}, "write response_format"),
    ],
)
def test_foreign_fields_that_ask_for_something_are_refused(field, value, instead):
    error = refuse(custom_id="c", body={"prompt": "a", field: value})
    assert error.startswith(f"body.{field}: found {value!r}"[:40])
    assert instead in error.partition(", but ")[2]


def test_variables_of_the_chat_template():
    variables = {"enable_thinking": False}
    assert parse(messages=CHAT, chat_template_kwargs=variables).template_variables == variables
    assert "are for chats: write messages" in refuse(prompt="a", chat_template_kwargs=variables)
    assert "found tools, which has a field of its own" in refuse(messages=CHAT, chat_template_kwargs={"tools": []})


def test_the_words_body_and_custom_id_in_a_prompt_do_not_make_a_batch_line():
    assert parse(prompt='"body" "custom_id"', id="q").request_id == "q"


FIELDS = st.sampled_from([*SamplingParams.__dataclass_fields__, "prompt", "messages", "body", "custom_id"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner), max_leaves=9)


@given(JSON)
@settings(max_examples=80, deadline=None)
def test_any_json_is_a_request_or_a_request_error(value):
    try:
        parse_request(json.dumps(value).encode("utf-8", "surrogatepass"), "line-1")
    except RequestError as error:
        assert str(error)


# The pieces


@given(st.lists(st.binary(max_size=12), max_size=12), st.integers(1, 9), st.integers(1, 8))
def test_lines_are_those_of_split_whatever_the_chunks(parts, limit, chunk):
    data = b"\n".join(part.replace(b"\n", b"") for part in parts)
    splitter = LineSplitter(limit)
    lines = [line for at in range(0, len(data), chunk) for line in splitter.feed(data[at : at + chunk])]
    lines += splitter.finish()
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert [line.number for line in lines] == list(range(1, len(expected) + 1))
    assert [line.size for line in lines] == [len(part) for part in expected]
    assert [data[line.offset : line.offset + line.size] for line in lines] == expected
    assert [line.oversize for line in lines] == [len(part) > limit for part in expected]
    assert [line.data for line in lines if not line.oversize] == [part for part in expected if len(part) <= limit]


@given(st.sets(st.integers(1, 5000)), st.sets(st.integers(1, 5000)))
def test_a_line_set_is_a_set(a, b):
    left, right = LineSet(), LineSet()
    for line in a:
        left.add(line)
    for line in b:
        right.add(line)
    left.update(right)
    assert len(left) == len(a | b)
    assert {line for line in range(5100) if line in left} == a | b


def test_the_operator_says_what_it_promises():
    assert "exactly once" in JsonlSource.guarantee
    assert "jsonl_source" in JsonlSource.example
    assert issubclass(JsonlSource.config_model, Config)
