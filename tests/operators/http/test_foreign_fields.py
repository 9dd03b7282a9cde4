"""http_source: bodies as other clients send them, with fields that ask for nothing here."""

from __future__ import annotations

import pytest

MODEL = {"model": "builtin:pydoc-tiny"}
MESSAGES = [{"role": "user", "content": "What does heapq.heappush do?"}]
NULLS = ("temperature", "top_p", "n", "stop", "seed", "logit_bias", "logprobs", "tools", "tool_choice", "functions",
         "function_call", "response_format", "user", "metadata", "presence_penalty", "frequency_penalty",
         "parallel_tool_calls", "reasoning_effort", "service_tier", "stream_options", "store")  # fmt: skip
CHATS = {
    "litellm": dict.fromkeys(NULLS),
    "langchain": {"n": 1, "temperature": 0.7, "stream": False, "parallel_tool_calls": False, "metadata": {"run": "1"},
                  "messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "name": "ann",
                               "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}]},
    "llama_index": {"temperature": 0.1, "logprobs": False, "top_logprobs": 0, "tool_choice": "auto", "tools": []},
    "ai sdk": {"max_tokens": None, "max_completion_tokens": 4, "store": False, "verbosity": "medium",
               "prompt_cache_key": "k", "prompt_cache_retention": "24h", "response_format": {"type": "text"}},
    "vllm": {"top_k": -1, "ignore_eos": True, "min_tokens": 2, "repetition_penalty": 1.0, "skip_special_tokens": True,
             "spaces_between_special_tokens": True, "use_beam_search": False, "length_penalty": 1.0, "echo": False,
             "add_generation_prompt": True, "add_special_tokens": False, "chat_template_kwargs": {},
             "include_stop_str_in_output": False, "return_token_ids": None, "mm_processor_kwargs": None},
    "history": {"messages": [*MESSAGES, {"role": "assistant", "content": "It pushes.", "refusal": None, "audio": None,
                                         "annotations": [], "tool_calls": None, "function_call": None}, *MESSAGES]},
}  # fmt: skip
COMPLETIONS = {
    "vllm bench": {"best_of": 1, "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 4, "logprobs": None,
                   "ignore_eos": True, "stream": True,
                   "stream_options": {"include_usage": True, "continuous_usage_stats": False}},
    "ids": {"prompt": [[1, 2], [3]], "echo": False, "suffix": "", "add_special_tokens": True},
}  # fmt: skip
RESPONSES = {
    "agents": {"instructions": "Be brief.", "tools": [], "include": [], "tool_choice": None, "text": None},
    "codex": {"include": ["reasoning.encrypted_content"], "reasoning": None, "prompt_cache_key": "k", "store": False},
    "langchain": {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "reasoning": {"effort": None}},
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_chats(tiny_server, name):
    body = {**MODEL, "messages": MESSAGES, "max_tokens": 4, **CHATS[name]}
    status, answer = tiny_server.post("/v1/chat/completions", **body)
    assert (status, answer.get("error")) == (200, None)
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions(tiny_server, name):
    status, _ = tiny_server.post("/v1/completions", **{**MODEL, "prompt": "Return the", **COMPLETIONS[name]})
    assert status == 200


@pytest.mark.parametrize("name", RESPONSES)
def test_responses(tiny_server, name):
    body = {**MODEL, "input": [{"role": "user", "content": "Hi"}], "max_output_tokens": 4, **RESPONSES[name]}
    status, answer = tiny_server.post("/v1/responses", **body)
    assert (status, answer["status"]) == (200, "incomplete")


@pytest.mark.parametrize(
    ("fields", "param", "instead"),
    [
        ({"functions": [{"name": "f"}]}, "functions", "write tools"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "write one"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats",
         "write include_usage"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs", "leave it out"),
        ({"guided_choice": ["yes", "no"]}, "guided_choice", 'write guided_regex: "(yes|no)"'),
        ({"request_id": "a"}, "request_id", "write the header X-Request-Id"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "write a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
         "messages.0.content.0.type", "should be 'text'"),
        ({"messages": [{"role": "user", "content": "a " * 2000}]}, None, "maximum context length is"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "leave them out"),
    ],
)  # fmt: skip
def test_what_would_have_an_effect_is_refused(tiny_server, fields, param, instead):
    status, answer = tiny_server.post("/v1/chat/completions", **{**MODEL, "messages": MESSAGES, **fields})
    assert (status, answer["error"]["param"]) == (400, param)
    assert instead in answer["error"]["message"]
