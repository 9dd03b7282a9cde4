"""http_source with the `openai` package, as its users call it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import anyio
import openai
import pytest

QUESTION = [{"role": "user", "content": "What does heapq.heappush do?"}]
ANSWER = "Push item onto heap, maintaining the heap invariant."
FULL = {"messages": QUESTION, "max_tokens": 40}


@contextmanager
def client_of(server, **options):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, **options) as client:
        yield client


ON = {"ignore_eos": True}  # as extra_body: what would go on for ever


def test_without_max_tokens_an_answer_goes_on_until_the_model_ends_it(client, model):
    answer = client.chat.completions.create(model=model, messages=QUESTION)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (ANSWER, "stop")


def test_or_until_the_context_is_full(serve):
    with serve("engine.model.max_seq_len=300") as server, client_of(server) as client:
        answer = client.chat.completions.create(model="builtin:null", messages=QUESTION, extra_body=ON)
        assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (300, "length")
        response = client.responses.create(model="builtin:null", input=QUESTION[0]["content"], extra_body=ON)
        assert (response.status, response.max_output_tokens) == ("incomplete", None)
        assert response.usage.total_tokens == 300


@pytest.mark.parametrize("n", [1, 3])
def test_or_until_it_has_all_of_the_kv_pool(serve, n):
    with serve("engine.kv_cache.max_tokens=256") as server, client_of(server) as client:
        for at in range(2):  # the second finds the first one's prompt in the cache
            answer = client.chat.completions.create(model="builtin:null", messages=QUESTION, n=n, extra_body=ON)
            assert {choice.finish_reason for choice in answer.choices} == {"length"}
            prompt = answer.usage.prompt_tokens
            assert answer.usage.completion_tokens == n * (256 - 16 * (n - 1) - prompt), at


def test_a_completion_without_max_tokens_has_sixteen(client, model):
    answer = client.completions.create(model=model, prompt="Return the", extra_body=ON)
    assert answer.usage.completion_tokens == 16


def test_models(client, model):
    (listed,) = client.models.list().data
    assert (listed.id, listed.object) == (model, "model")
    assert client.models.retrieve(model) == listed
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_a_chat_is_answered(client, model):
    answer = client.chat.completions.create(model=model, **FULL)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == ANSWER
    assert choice.finish_reason == "stop"
    assert answer.usage.prompt_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == model


def test_a_stream_says_the_same(client, model):
    whole = client.chat.completions.create(model=model, **FULL)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=model, **FULL, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 11  # the second time
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_completion_and_its_stream(client, model):
    body = {"model": model, "prompt": "Return the", "max_tokens": 8}
    whole = client.completions.create(**body)
    chunks = list(client.completions.create(**body, stream=True))
    assert whole.choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text != ""
    assert chunks[-1].choices[0].finish_reason == "length"


def test_several_prompts_with_several_choices_each(client, model):
    prompts = ["Return the", "List of", [5, 6, 7]]
    alone = [client.completions.create(model=model, prompt=prompt, max_tokens=5).choices[0].text for prompt in prompts]
    for together in ([prompts[0], prompts[1]], [[1, 2], prompts[2]]):
        answer = client.completions.create(model=model, prompt=together, max_tokens=5, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        stream = client.completions.create(model=model, prompt=together, max_tokens=5, n=2, stream=True)
        texts = dict.fromkeys(range(4), "")
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert [choice.text for choice in answer.choices] == list(texts.values())
    assert texts[3] == alone[2]


def test_seeded_choices_differ_and_come_again(client, model):
    body = {"model": model, "prompt": "a", "max_tokens": 12, "n": 3, "seed": 7, "temperature": 2}
    first, again = (client.completions.create(**body) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) > 1


def test_stop_logit_bias_and_our_own_fields(client, model):
    answer = client.chat.completions.create(model=model, **FULL, stop=[" heap"])
    assert answer.choices[0].message.content == "Push item onto"
    assert answer.choices[0].finish_reason == "stop"
    token = client.chat.completions.create(model=model, **FULL, logprobs=True, top_logprobs=1)
    first = token.choices[0].logprobs.content[0].token
    banned = client.chat.completions.create(
        model=model, **FULL, logit_bias={str(banned_id(client, first)): -100}, extra_body={"top_k": 5, "min_p": 0.01}
    )
    assert not banned.choices[0].message.content.startswith(first)


def banned_id(client, text):
    """The id of the token that the answer begins with: greedy decoding of one token tells it by its logprobs."""
    from sageLLM.config import ModelConfig
    from sageLLM.models.resolve import resolve_model
    from sageLLM.models.tokenizer import load_tokenizer

    (token,) = load_tokenizer(resolve_model(ModelConfig(model_id="builtin:pydoc-tiny"))).encode(text)
    return token


@pytest.mark.parametrize("stream", [False, True])
def test_the_logprobs_of_a_chat_spell_its_text(client, model, stream):
    body = {"model": model, **FULL, "logprobs": True, "top_logprobs": 2}
    if stream:
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**body, stream=True)]
        entries = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content]
    else:
        entries = client.chat.completions.create(**body).choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == ANSWER
    assert "".join(entry.token for entry in entries) == ANSWER
    for entry in entries:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


@pytest.mark.parametrize("stream", [False, True])
def test_the_logprobs_of_a_completion_have_offsets_into_its_text(client, model, stream):
    body = {"model": model, "prompt": "Return the", "max_tokens": 8, "logprobs": 2}
    if stream:
        chunks = [chunk.choices[0] for chunk in client.completions.create(**body, stream=True)]
        text = "".join(chunk.text for chunk in chunks)
        told = [chunk.logprobs for chunk in chunks if chunk.logprobs]
        tokens = [token for one in told for token in one.tokens]
        offsets = [offset for one in told for offset in one.text_offset]
    else:
        (choice,) = client.completions.create(**body).choices
        text, tokens, offsets = choice.text, choice.logprobs.tokens, choice.logprobs.text_offset
        assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
        assert len(choice.logprobs.token_logprobs) == len(tokens)
    assert "".join(tokens) == text
    assert all(text[offset:].startswith(token) for token, offset in zip(tokens, offsets, strict=True))


def test_prompt_logprobs(client, model):
    wanted = {"prompt_logprobs": 1}
    answer = client.completions.create(model=model, prompt="Return the", max_tokens=1, extra_body=wanted)
    first, *others = answer.choices[0].model_extra["prompt_logprobs"]
    assert first is None
    assert all(1 <= len(position) <= 2 for position in others)


def test_an_id_of_ones_own_comes_back(client, model):
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=QUESTION, max_tokens=1, extra_headers={"X-Request-Id": "mine-7"}
    )
    assert raw.headers["x-request-id"] == "mine-7"
    assert raw.parse().id == "mine-7"
    unnamed = client.chat.completions.with_raw_response.create(model=model, messages=QUESTION, max_tokens=1)
    assert unnamed.parse().id == unnamed.headers["x-request-id"] == unnamed.parse()._request_id
    assert unnamed.parse().id.startswith("chatcmpl-")


def test_errors_are_the_clients_own(client, model):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=QUESTION, temperature=-1)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model=model, prompt="word " * 5000)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model=model, prompt="word " * 5000, stream=True)


def test_fifty_at_once(tiny_server, model):
    async def main():
        async with openai.AsyncOpenAI(base_url=tiny_server.url, api_key="none", max_retries=0) as client:
            answers = {}

            async def ask(number):
                stream = number % 2 == 0
                answer = await client.chat.completions.create(model=model, **FULL, stream=stream)
                if stream:
                    parts = [chunk.choices[0].delta.content or "" async for chunk in answer]
                    answers[number] = "".join(parts)
                else:
                    answers[number] = answer.choices[0].message.content

            async with anyio.create_task_group() as tasks:
                for number in range(50):
                    tasks.start_soon(ask, number)
            return answers

    assert anyio.run(main) == dict.fromkeys(range(50), ANSWER)


ENDLESS = {"model": "builtin:null", "prompt": "go on", "max_tokens": 30000, "extra_body": {"ignore_eos": True}}


def nothing_runs(server):
    return server.flow.ledger.counters()["in_flight"] == 0 and server.services.worker.num_running == 0


def test_leaving_a_stream_cancels_it(null_server):
    with client_of(null_server) as client:
        with client.completions.create(**ENDLESS, stream=True) as stream:
            next(iter(stream))
            assert null_server.services.worker.num_running == 1
        null_server.until(lambda: nothing_runs(null_server))
    null_server.check_free()


def test_a_client_that_gives_up_cancels_its_request(null_server):
    with client_of(null_server, timeout=0.2) as client, pytest.raises(openai.APITimeoutError):
        client.completions.create(**ENDLESS)
    null_server.until(lambda: nothing_runs(null_server))
    null_server.check_free()


def test_a_cancelled_task_cancels_its_request(null_server):
    async def main():
        async with openai.AsyncOpenAI(base_url=null_server.url, api_key="none", max_retries=0) as client:
            with anyio.move_on_after(0.2) as scope:
                await client.completions.create(**ENDLESS)
            assert scope.cancelled_caught

    anyio.run(main)
    null_server.until(lambda: nothing_runs(null_server))


def test_threads_share_a_client(null_server):
    with client_of(null_server) as client, ThreadPoolExecutor(16) as threads:
        gate = threading.Barrier(16)

        def ask(number):
            gate.wait()
            answer = client.completions.create(model="builtin:null", prompt=f"{number}", max_tokens=number)
            return answer.usage.completion_tokens

        assert list(threads.map(ask, range(1, 17))) == list(range(1, 17))
