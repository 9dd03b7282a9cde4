"""The Python API: one call, lists, threads, event loops, endings, and what get_stats tells."""

from __future__ import annotations

import re
import threading
from concurrent.futures import Future

import anyio
import numpy as np
import pytest
import torch

from sageLLM import GenerateRequest, ModelConfig, SageLLMConfig, SageLLMEngine, SchedulerConfig
from sageLLM.errors import EngineClosedError, ModelNotFoundError, RequestError
from sageLLM.records import FinishReason, Request, SamplingParams


@pytest.fixture(scope="module")
def folder(checkpoint_folder):
    return checkpoint_folder("qwen2")


@pytest.fixture(scope="module")
def engine(folder):
    config = SageLLMConfig(
        model=ModelConfig(model_id=str(folder)),
        kv_cache={"max_tokens": 4096},
        backend={"backend_type": "cpu", "threads": 1},
    )
    with SageLLMEngine(config) as running:
        yield running


@pytest.fixture(scope="module")
def greedy(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as ignore_eos: nothing is masked, nothing ends

    def generate(prompt, count):
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                              pad_token_id=0)  # fmt: skip
        return made[0, len(prompt) :].tolist()

    return generate


def ask(prompt, count=8, **options):
    return GenerateRequest(prompt_tokens=prompt, max_new_tokens=count, temperature=0.0, ignore_eos=True, **options)


def test_generate_equals_transformers(engine, greedy):
    output = engine.generate(ask([5, 6, 7, 8], 12, request_id="mine"))
    assert output.request_id == "mine"
    assert output.output_tokens == greedy([5, 6, 7, 8], 12)
    assert output.finish_reason == "length"
    assert 0 < output.metrics.ttft_ms <= output.metrics.e2e_ms
    assert output.metrics.tpot_ms > 0
    assert output.metrics.throughput_tps > 0


def test_a_list_gives_outputs_in_order(engine, greedy):
    prompts = [[i, i + 1, i + 2] for i in range(5, 17)]
    outputs = engine.generate([ask(prompt) for prompt in prompts])
    assert [o.output_tokens for o in outputs] == [greedy(prompt, 8) for prompt in prompts]


def test_a_bad_request_in_a_list_does_not_lose_the_good_ones(engine):
    good, bad = engine.generate([ask([5, 6]), ask([10**6])])
    assert good.error is None
    assert bad.finish_reason == "error"
    assert "1000000" in bad.error


def test_a_single_bad_request_raises(engine):
    with pytest.raises(RequestError, match="top_p"):
        engine.generate(ask([5, 6], top_p=7.0))
    with pytest.raises(RequestError, match="found no prompt: write one of prompt, messages, prompt_tokens"):
        engine.generate(GenerateRequest())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"stop_sequences": [3]}, "stop"),
        ({"stop_sequences": [""]}, "stop"),
        ({"max_new_tokens": "5"}, "max_new_tokens: found '5'"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0"),
        ({"temperature": "hot"}, "temperature: found 'hot'"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"logit_bias": {5: "a"}}, "logit_bias"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"presence_penalty": "a"}, "presence_penalty"),
        ({"n": 2.0}, "n: found 2.0"),
        ({"seed": 1.5}, "seed: found 1.5"),
        ({"logprobs": 50}, "logprobs: found 50"),
        ({"prompt_tokens": [1.5]}, "prompt_tokens"),
        ({"prompt_tokens": (1.5, 2)}, "prompt_tokens: found"),
        ({"prompt_tokens": None, "prompt": 5}, "prompt: found 5"),
        ({"prompt_tokens": None, "messages": [{"role": "wizard", "content": "a"}]}, "role: found 'wizard'"),
        ({"prompt_tokens": None, "messages": [{"role": "user"}]}, "messages.0: a message of user has no content"),
        ({"prompt_tokens": []}, "prompt_tokens"),
    ],
)
def test_a_field_of_a_wrong_type_or_value_fails_its_request_alone(engine, fields, told):
    """In the caller's thread: the engine and the others never see it."""
    bad = GenerateRequest(**{"prompt_tokens": [5, 6], **fields})
    with pytest.raises(RequestError, match=re.escape(told)):
        engine.generate(bad)
    failed, good = engine.generate([bad, ask([5, 6])])
    assert (failed.finish_reason, good.error) == ("error", None)
    assert told in failed.error


def test_prompt_tokens_may_be_whatever_holds_integers(engine):
    expected = engine.generate(ask([5, 6, 7])).output_tokens
    for tokens in ((5, 6, 7), np.array([5, 6, 7]), list(np.array([5, 6, 7], np.int32))):
        assert engine.generate(ask(tokens)).output_tokens == expected


def test_one_stop_sequence_may_be_a_text(engine):
    whole = engine.generate(GenerateRequest(prompt="the quick", max_new_tokens=8, temperature=0.0)).text
    cut = engine.generate(
        GenerateRequest(prompt="the quick", max_new_tokens=8, temperature=0.0, stop_sequences=whole[1:3])
    )
    assert cut.text == whole[: whole.index(whole[1:3])]


@pytest.mark.parametrize("request_", ["hello", {"prompt": "hello"}, ["hello"]])
def test_what_is_no_request_is_told_what_to_write(engine, request_):
    with pytest.raises(RequestError, match="write a GenerateRequest"):
        engine.generate(request_)


def test_text_in_text_out(engine):
    output = engine.generate(GenerateRequest(prompt="the quick brown", max_new_tokens=6, temperature=0.0))
    assert isinstance(output.text, str)
    assert output.text


def test_five_shared_tokens_are_a_cache_hit(engine):
    before = engine.get_stats()["kv_cache"]["cache_hits"]
    engine.generate(ask([201, 202, 203, 204, 205, 6, 7]))
    output = engine.generate(ask([201, 202, 203, 204, 205, 90, 91]))
    assert output.metrics.prefix_hit_tokens == 5
    assert engine.get_stats()["kv_cache"]["cache_hits"] == before + 1


def test_a_pinned_prompt_is_kept_until_it_is_unpinned(engine):
    def pinned():
        return engine.get_stats()["kv_cache"]["pinned_blocks"]

    prompt = list(range(40, 75))
    engine.generate(ask(prompt, 1, pin=True))
    assert pinned() == 3
    engine.generate([ask([*prompt, n], 1) for n in range(3)])
    assert pinned() == 3
    engine.generate(ask(prompt, 1, unpin=True))
    assert pinned() == 0
    with pytest.raises(RequestError, match="found pin and unpin"):
        engine.generate(ask(prompt, 1, pin=True, unpin=True))


def test_stats_tell_how_long_blocks_rest(engine):
    for _ in range(10):
        engine.generate(ask([9] * 33, 1))
    gap = engine.get_stats()["kv_cache"]["block_reuse_gap_s"]
    assert set(gap) == {"count", "mean", "p50", "p99"}
    assert set(engine.get_stats()["kv_cache"]) >= {"block_lifetime_s", "block_idle_before_evict_s"}


def test_calls_from_many_threads_are_batched(engine, greedy):
    outputs = {}

    def call(i):
        outputs[i] = engine.generate(ask([30 + i, 31, 32], 20)).output_tokens

    steps = engine.get_stats()["worker"]["steps"]
    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {i: greedy([30 + i, 31, 32], 20) for i in range(8)}
    assert engine.get_stats()["worker"]["steps"] - steps < 8 * 20


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_async_calls(engine, greedy, backend):
    async def main():
        tokens = [token async for token in engine.generate_stream(ask([9, 10, 11], 10))]
        output = await engine.generate_async(ask([9, 10, 11], 10))
        return tokens, output.output_tokens

    expected = greedy([9, 10, 11], 10)
    assert anyio.run(main, backend=backend) == (expected, expected)


def test_leaving_a_stream_cancels_the_request(engine):
    async def main():
        stream = engine.generate_stream(ask([9, 10, 11], 200))
        async for _ in stream:
            break
        await stream.aclose()

    before = engine.get_stats()["requests"]["cancelled"]
    anyio.run(main)
    engine.generate(ask([1, 2, 3]))
    for _ in range(200):
        requests = engine.get_stats()["requests"]
        if requests["in_flight"] == 0:
            break
        engine.generate(ask([1, 2, 3], 1))
    assert requests["cancelled"] == before + 1


def test_stop_strings_end_the_text_before_them(engine):
    whole = engine.generate(ask([40, 41, 42], 30)).text
    stop = whole[5:8]
    output = engine.generate(ask([40, 41, 42], 30, stop_sequences=[stop]))
    assert output.finish_reason == "stop"
    assert output.text == whole[: whole.index(stop)]
    assert output.choices[0].stop_matched == stop


def test_n_choices_with_a_seed(engine):
    request = GenerateRequest(prompt_tokens=[5, 6, 7], max_new_tokens=10, n=3, seed=4, ignore_eos=True)
    first, second = engine.generate(request), engine.generate(request)
    assert len(first.choices) == 3
    assert [c.output_tokens for c in first.choices] == [c.output_tokens for c in second.choices]
    assert first.choices[0].output_tokens != first.choices[1].output_tokens


def record(prompt, count=8):
    sampling = SamplingParams(max_new_tokens=count, temperature=0.0, ignore_eos=True)
    return Request("r", prompt_tokens=prompt, sampling=sampling)


def submit(engine, records):
    calls = [(each, Future()) for each in records]
    engine.submit([(each, future.set_result) for each, future in calls])
    return [future for _, future in calls]


def test_submitted_records_end_in_a_function_of_the_callers(engine, greedy):
    good, bad = record([5, 6, 7]), record([10**6])
    completed, failed = (future.result() for future in submit(engine, [good, bad]))
    assert completed.request is good
    assert completed.output_tokens == greedy([5, 6, 7], 8)
    assert failed.request is bad
    assert "1000000" in failed.error


def test_submitted_records_can_be_cancelled(engine):
    endless = record([5, 6, 7], 250)
    (future,) = submit(engine, [endless])
    engine.cancel([endless])
    assert future.result().finish_reason is FinishReason.CANCELLED


def test_nothing_is_left_when_idle(engine):
    engine.generate([ask([i, 3, 4]) for i in range(20)])
    stats = engine.get_stats()
    assert stats["initialized"]
    assert stats["backend"] == "cpu"
    assert stats["requests"]["in_flight"] == 0
    assert stats["kv_pool"]["available_blocks"] == stats["kv_pool"]["num_blocks"]


def test_shutdown_finishes_what_is_in_flight_and_refuses_the_rest(folder):
    engine = SageLLMEngine(SageLLMConfig(model=ModelConfig(model_id=str(folder)), kv_cache={"max_tokens": 1024}))
    with pytest.raises(EngineClosedError, match="initialize"):
        engine.generate(ask([1, 2]))
    engine.initialize()
    engine.initialize()
    results = []
    thread = threading.Thread(target=lambda: results.append(engine.generate([ask([1, 2], 60), ask([3], 60)])))
    thread.start()
    while not engine.get_stats()["requests"]["accepted"]:
        pass
    engine.shutdown()
    engine.shutdown()
    thread.join()
    assert [len(o.output_tokens) for o in results[0]] == [60, 60]
    with pytest.raises(EngineClosedError):
        engine.generate(ask([1, 2]))
    assert engine.get_stats()["initialized"] is False


def test_shutdown_can_cancel_what_is_in_flight(folder):
    config = SageLLMConfig(model=ModelConfig(model_id=str(folder)), scheduler=SchedulerConfig(max_batch_size=2))
    with SageLLMEngine(config) as engine:
        futures = submit(engine, [record([n, 6, 7], 250) for n in range(40)])
        engine.shutdown(cancel=True)
        assert {future.result(0).finish_reason for future in futures} == {FinishReason.CANCELLED}
        with pytest.raises(EngineClosedError, match="initialize"):
            submit(engine, [record([1])])


def test_a_model_that_does_not_exist_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="no/such-model"):
        SageLLMEngine(SageLLMConfig(model=ModelConfig(model_id="no/such-model"))).initialize()


def test_a_request_past_its_deadline_says_timeout(folder):
    config = SageLLMConfig(model=ModelConfig(model_id=str(folder)), scheduler=SchedulerConfig(request_timeout_s=1e-4))
    with SageLLMEngine(config) as engine:
        assert engine.generate(ask([1, 2, 3], 200)).finish_reason == "timeout"
