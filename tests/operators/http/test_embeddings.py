"""POST /v1/embeddings, with the `openai` package and without."""

from __future__ import annotations

import numpy as np
import openai
import pytest

from sageLLM import ModelConfig, SageLLMConfig, SageLLMEngine

TEXTS = ["What does heapq.heappush do?", "Join strings.", "What does heapq.heappush do?"]


@pytest.fixture(scope="module")
def expected():
    with SageLLMEngine(SageLLMConfig(model=ModelConfig(model_id="builtin:pydoc-tiny"))) as engine:
        return {pooling: np.array(engine.embed(TEXTS, pooling=pooling)) for pooling in ("mean", "last")}


@pytest.mark.parametrize("encoding", ["float", "base64", openai.omit])
def test_texts_become_vectors_in_order(client, model, expected, encoding):
    answer = client.embeddings.create(model=model, input=TEXTS, encoding_format=encoding)
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    vectors = [entry.embedding for entry in answer.data]
    if encoding == "base64":  # which the client decodes only where it asked for it by itself
        import base64

        vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
    np.testing.assert_allclose(np.array(vectors), expected["mean"], rtol=0, atol=2e-2)  # bf16, in another batch
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 10
    assert answer.model == model


def test_the_last_tokens(client, model, expected):
    answer = client.embeddings.create(model=model, input=TEXTS[0], extra_body={"pooling": "last"})
    np.testing.assert_allclose(answer.data[0].embedding, expected["last"][0], rtol=0, atol=2e-2)


def test_token_ids_are_inputs_too(client, model, tiny_server):
    ids = tiny_server.services.tokenizer.encode(TEXTS[1])
    one, two = (client.embeddings.create(model=model, input=given) for given in (ids, [ids, ids]))
    assert one.usage.prompt_tokens == len(ids) and len(one.data) == 1
    assert two.usage.prompt_tokens == 2 * len(ids) and len(two.data) == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": "a", "dimensions": 7}, "dimensions"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "temperature": 1}, "temperature"),
    ],
)
def test_what_is_wrong_is_named(client, model, body, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/embeddings", body={"model": model, **body}, cast_to=object)
    assert caught.value.param == param
