"""SageLLMEngine.embed: what transformers' hidden states give, wherever they are computed."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from sageLLM import GenerateRequest, SageLLMConfig, SageLLMEngine
from sageLLM.errors import EngineClosedError, RequestError

# One that fills several steps, and some that share a beginning.
PROMPTS = [[7, 8, 9] * 25, [7, 8, 9] * 20 + [4], [5], [6, 300, 11]]


@pytest.fixture(scope="module")
def folder(checkpoint_folder):
    return checkpoint_folder("qwen2")


@pytest.fixture(scope="module")
def expected(folder):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def embed(prompt, pooling):
        with torch.inference_mode():
            hidden = model(torch.tensor([prompt])).last_hidden_state[0].numpy()
        pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
        return pooled / np.linalg.norm(pooled)

    return embed


@pytest.fixture(scope="module", params=[{}, {"mode": "time_share"}, {"mode": "strict"},
                                        {"mode": "strict", "isolation": "process"}], ids=str)  # fmt: skip
def engine(folder, request):
    config = SageLLMConfig(
        model={"model_id": str(folder), "dtype": "float32"},
        kv_cache={"max_tokens": 1024},
        backend={"backend_type": "cpu", "threads": 1},
        scheduler={"max_step_tokens": 32, "queue_timeout_s": 0, "request_timeout_s": 0, **request.param},
    )
    with SageLLMEngine(config) as running:
        yield running


@pytest.mark.parametrize("pooling", ["mean", "last", "mean", "last"])  # then with their KV in the cache
def test_embeddings_equal_transformers_beside_requests_that_decode(engine, expected, pooling):
    decode = threading.Thread(
        target=engine.generate, args=([GenerateRequest(prompt_tokens=prompt, max_new_tokens=40) for prompt in PROMPTS],)
    )
    decode.start()
    found = engine.embed(PROMPTS, pooling)
    decode.join()
    for embedding, prompt in zip(found, PROMPTS, strict=True):
        assert embedding.dtype == np.float32
        np.testing.assert_allclose(embedding, expected(prompt, pooling), rtol=1e-3, atol=1e-5)


def test_texts_and_token_ids_give_the_same(engine):
    tokens = engine._services.tokenizer.encode("the quick brown fox")
    text, ids, array = engine.embed(["the quick brown fox", tokens, np.array(tokens)])
    np.testing.assert_allclose(text, ids, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(text, array, rtol=1e-4, atol=1e-6)
    assert engine.embed([]) == []


@pytest.mark.parametrize(
    ("prompts", "pooling", "told"),
    [
        ("a text", "mean", "found 'a text': write a list of texts"),
        (["a"], "max", "pooling: found 'max', should be 'mean' or 'last'"),
        (["a", ""], "mean", "the prompt is empty"),
        ([[10**6]], "mean", "token id 1000000 is not in the vocabulary"),
        ([5], "mean", "prompts: found 5, write a list of token ids"),
        ([[5] * 257], "mean", "send at most 256"),
    ],
)
def test_what_cannot_be_embedded(engine, prompts, pooling, told):
    with pytest.raises(RequestError, match=told):
        engine.embed(prompts, pooling)


def test_an_engine_that_is_shut_down(folder):
    with pytest.raises(EngineClosedError, match="initialize"):
        SageLLMEngine(SageLLMConfig(model={"model_id": str(folder)})).embed(["a"])
