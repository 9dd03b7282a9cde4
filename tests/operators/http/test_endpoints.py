"""http_source's answers one by one: statuses, headers, error bodies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sageLLM.operators.sources.openai import http_date

PROMPT = {"prompt": "hello", "max_tokens": 3}


def error_of(answer):
    status, headers, body = answer
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert headers["x-request-id"]
    return status, body["error"]["code"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "expected"),
    [
        ("GET", "/v1/nothing", None, {}, (404, "not_found")),
        ("GET", "/", None, {}, (404, "not_found")),
        ("GET", "/v1/completions", None, {}, (405, "method_not_allowed")),
        ("DELETE", "/v1/models/builtin:null", None, {}, (405, "method_not_allowed")),
        ("GET", "/v1/models/other", None, {}, (404, "model_not_found")),
        ("POST", "/v1/completions", {"model": "other", **PROMPT}, {}, (404, "model_not_found")),
        ("POST", "/v1/completions", b"{", {}, (400, "invalid_request")),
        ("POST", "/v1/completions", b"", {}, (400, "invalid_request")),
        ("POST", "/v1/completions", b"\xff", {}, (400, "invalid_request")),
        ("POST", "/v1/completions", [], {}, (400, "invalid_request")),
        ("POST", "/v1/completions", {}, {}, (400, "invalid_request")),
        ("POST", "/v1/completions", {"prompt": []}, {}, (400, "invalid_request")),
        ("POST", "/v1/completions", {"messages": [{"role": "user", "content": "x"}]}, {}, (400, "invalid_request")),
        ("POST", "/v1/chat/completions", PROMPT, {}, (400, "invalid_request")),
        ("POST", "/v1/chat/completions", {"messages": []}, {}, (400, "invalid_request")),
        ("POST", "/v1/completions", {**PROMPT, "n": 1000}, {}, (400, "invalid_request")),
        ("POST", "/v1/completions", {**PROMPT, "echo": True}, {}, (400, "invalid_request")),
        ("POST", "/v1/completions", {**PROMPT, "stream_options": {}}, {}, (400, "invalid_request")),
        ("POST", "/v1/completions", PROMPT, {"content_type": "text/plain"}, (415, "unsupported_media_type")),
        ("POST", "/v1/completions", PROMPT, {"content_encoding": "gzip"}, (415, "unsupported_media_type")),
        ("POST", "/v1/completions", PROMPT, {"x_request_id": "x" * 129}, (400, "invalid_header")),
        ("POST", "/detokenize", {"tokens": [-1]}, {}, (400, "invalid_request")),
        ("POST", "/detokenize", {"tokens": [1_000_000]}, {}, (400, "invalid_request")),
        ("POST", "/tokenize", {}, {}, (400, "invalid_request")),
    ],
)
def test_what_is_wrong_is_told_as_openai_does(null_server, method, path, body, headers, expected):
    assert error_of(null_server.exchange(method, path, body, **headers)) == expected


def test_the_field_that_is_wrong_is_named(null_server):
    _, answer = null_server.post("/v1/completions", **PROMPT, temperatur=1)
    assert answer["error"]["param"] == "temperatur"
    assert answer["error"]["message"] == "unknown field 'temperatur': did you mean 'temperature'?"
    assert answer["error"]["type"] == "invalid_request_error"


def test_another_method_is_told_which_are_allowed(null_server):
    assert null_server.exchange("PUT", "/v1/completions")[1]["allow"] == "POST"
    assert null_server.exchange("POST", "/health", {})[1]["allow"] == "GET, HEAD"


def test_the_date_is_that_of_the_answer(serve, monkeypatch):
    with serve(loading=True) as server:  # also before the flow runs
        for second, date in ((0, "Thu, 01 Jan 1970 00:00:00 GMT"), (90, "Thu, 01 Jan 1970 00:01:30 GMT")):
            monkeypatch.setattr(http_date, "time", SimpleNamespace(time=lambda now=second: now))
            assert server.exchange("GET", "/ready")[1].get_all("date") == [date]


def test_health_and_readiness(null_server):
    assert null_server.exchange("GET", "/health")[::2] == (200, {"status": "alive"})
    assert null_server.exchange("GET", "/ready")[::2] == (200, {"status": "ready"})


def test_a_call_need_not_name_the_model(null_server):
    status, answer = null_server.post("/v1/completions", **PROMPT)
    assert (status, answer["model"], answer["choices"][0]["finish_reason"]) == (200, "builtin:null", "length")


def test_text_to_tokens_and_back(tiny_server):
    status, answer = tiny_server.post("/tokenize", prompt="heap push", return_token_strs=True)
    assert (status, answer["count"], "".join(answer["token_strs"])) == (200, len(answer["tokens"]), "heap push")
    assert tiny_server.post("/detokenize", tokens=answer["tokens"]) == (200, {"prompt": "heap push"})
    messages = [{"role": "user", "content": "What does heapq.heappush do?"}]
    chat = tiny_server.post("/tokenize", messages=messages)[1]
    used = tiny_server.post("/v1/chat/completions", messages=messages, max_tokens=1)[1]["usage"]
    assert chat["count"] == used["prompt_tokens"]
    shorter = tiny_server.post("/tokenize", messages=messages, add_generation_prompt=False)[1]
    assert shorter["count"] < chat["count"]


def test_half_characters_are_told_by_their_bytes(tiny_server):
    answer = tiny_server.post("/tokenize", prompt="😀", return_token_strs=True)[1]
    told = tiny_server.post("/v1/completions", prompt=answer["tokens"], max_tokens=1, prompt_logprobs=0)[1]
    assert len(answer["tokens"]) > 1
    for position in told["choices"][0]["prompt_logprobs"][1:]:
        (entry,) = position.values()
        assert entry["decoded_token"].startswith("bytes:\\x")


def test_a_browser_may_call_only_from_named_origins(serve, null_server):
    asked = {"origin": "https://a.example", "access_control_request_method": "POST"}
    assert null_server.exchange("OPTIONS", "/v1/completions", **asked)[0] == 405
    assert "access-control-allow-origin" not in null_server.exchange("GET", "/health", origin="https://a.example")[1]
    with serve('operators.source.cors_origins=["https://a.example"]') as server:
        status, headers, _ = server.exchange("OPTIONS", "/v1/completions", **asked)
        assert (status, headers["access-control-allow-origin"]) == (200, "https://a.example")
        answered = server.exchange("POST", "/v1/completions", PROMPT, origin="https://a.example")
        assert answered[1]["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in answered[1]["access-control-expose-headers"]
        elsewhere = server.exchange("POST", "/v1/completions", PROMPT, origin="https://b.example")
        assert "access-control-allow-origin" not in elsewhere[1]


def test_a_name_of_ones_own(serve):
    with serve("operators.source.model_name=mine/model") as server:
        assert server.exchange("GET", "/v1/models/mine/model")[2]["id"] == "mine/model"
        assert server.exchange("GET", "/v1/models/mine%2Fmodel")[0] == 200
        assert server.post("/v1/completions", model="mine/model", **PROMPT)[1]["model"] == "mine/model"
        assert server.post("/v1/completions", model="builtin:null", **PROMPT)[0] == 404
