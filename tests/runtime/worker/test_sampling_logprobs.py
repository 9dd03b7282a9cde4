"""Logprobs are the model's own: log_softmax of the logits as they came, whatever sampling does to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sageLLM.records import SamplingParams
from sageLLM.runtime.worker.logprobs import prompt_logprobs, to_records
from sageLLM.runtime.worker.sampling import SamplingState

VOCAB = 100


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_logprobs_are_of_the_raw_logits(temperature):
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))
    state = SamplingState(2, VOCAB, "cpu")
    params = SamplingParams(
        temperature=temperature, top_p=0.5, repetition_penalty=2.0, logit_bias={3: 50.0}, logprobs=4, seed=0
    )
    for slot in range(2):
        state.admit(slot, params, [1, 2, 3], ())
    sampled = state.sample(logits.clone(), np.arange(2), np.zeros(2, np.int64))
    expected = logits.log_softmax(-1)
    assert sampled.tokens.tolist() == [3, 3]
    torch.testing.assert_close(sampled.logprobs, expected[:, 3])
    top = expected.topk(4)
    assert torch.equal(sampled.top_ids, top.indices)
    torch.testing.assert_close(sampled.top_logprobs, top.values)


def test_only_rows_that_asked_have_logprobs_each_with_its_own_k():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    state = SamplingState(3, VOCAB, "cpu")
    for slot, k in enumerate((None, 0, 3)):
        state.admit(slot, SamplingParams(temperature=0.0, logprobs=k), [1], ())
    sampled = state.sample(logits.clone(), np.array([2, 0, 1]), np.zeros(3, np.int64))
    expected = logits.log_softmax(-1).gather(1, sampled.tokens[:, None])[:, 0]
    assert sampled.logprobs.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(sampled.logprobs[[0, 2]], expected[[0, 2]])
    assert sampled.top_ids.shape == (3, 3)
    assert sampled.top_ids[1].tolist() == [-1, -1, -1]
    assert sampled.top_ids[0, 0] == sampled.tokens[0]


def test_logprobs_without_alternatives_have_no_columns():
    state = SamplingState(1, VOCAB, "cpu")
    state.admit(0, SamplingParams(temperature=0.0, logprobs=0), [1], ())
    sampled = state.sample(torch.zeros(1, VOCAB), np.zeros(1, np.int64), np.zeros(1, np.int64))
    assert sampled.top_ids.shape == (1, 0)
    torch.testing.assert_close(sampled.logprobs, torch.full((1,), -np.log(VOCAB), dtype=torch.float32))


@pytest.mark.parametrize("length", [1, 16, 37])
def test_prompt_logprobs_equal_log_softmax(length):
    logits = torch.randn(length, VOCAB, generator=torch.Generator().manual_seed(3)).bfloat16()
    following = torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(4))
    chosen, top_ids, top_logprobs = prompt_logprobs(logits, following, 5)
    expected = logits.float().log_softmax(-1)
    torch.testing.assert_close(chosen, expected[torch.arange(length), following])
    order = torch.sort(expected, descending=True, stable=True, dim=-1)
    assert torch.equal(top_ids, order.indices[:, :5])
    torch.testing.assert_close(top_logprobs, order.values[:, :5])


def test_records_hold_k_alternatives():
    records = to_records([7, 8], [-0.5, -1.0], [[7, 1], [2, 8]], [[-0.5, -2.0], [-0.75, -1.0]], 1)
    assert [(r.token, r.logprob, r.top) for r in records] == [(7, -0.5, [(7, -0.5)]), (8, -1.0, [(2, -0.75)])]
