"""Bias, min_tokens and penalties: what each does to the next token, preemption and launch-ahead included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from sageLLM.records import SamplingParams
from sageLLM.runtime.worker.sampling import SamplingState

VOCAB = 64


def reference(
    logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int], ends: tuple[int, ...]
) -> torch.Tensor:
    """The adjusted logits [V], written token by token; repetition by transformers' own processor."""
    x = logits.clone()
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    if len(output) < params.min_tokens:
        for token in (*params.stop_token_ids, *(() if params.ignore_eos else ends)):
            x[token] = -torch.inf
    if params.repetition_penalty != 1:
        processor = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
        x = processor(torch.tensor([prompt + output]), x[None])[0]
    for token in set(output):
        x[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    return x


GREEDY = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    repetition_penalty=st.sampled_from([1.0, 1.5, 0.7]),
    presence_penalty=st.sampled_from([0.0, 1.0, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.6, -0.25]),
    logit_bias=st.sampled_from([None, {3: 2.0}, {1: -100.0, 2: 1.0, 11: 0.5}]),
    min_tokens=st.sampled_from([0, 4, 30]),
    stop_token_ids=st.sampled_from([(), (5,), (7, 8, 9)]),
    ignore_eos=st.booleans(),
)


@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            GREEDY, st.lists(st.integers(3, 9), min_size=1, max_size=12), st.lists(st.integers(0, 11), max_size=5)
        ),
        min_size=1,
        max_size=5,
    ),
    preempted=st.sets(st.integers(0, 4)),
    seed=st.integers(0, 1000),
)
def test_greedy_tokens_equal_the_reference_at_every_step(requests, preempted, seed):
    """Rows of different lengths; some are released and admitted again, into another slot, half way."""
    generator = torch.Generator().manual_seed(seed)
    count, rounds, vocab, ends = len(requests), 8, 12, (4, 112)
    state = SamplingState(2 * count, vocab, "cpu")
    slots = np.arange(count)
    outputs = [list(output) for _, _, output in requests]
    for slot, (params, prompt, output) in enumerate(requests):
        state.admit(slot, params, prompt, ends, output)
    for number in range(rounds):
        if number == rounds // 2:
            for i in preempted & set(range(count)):
                state.release(i)
                slots[i] = count + i
                params, prompt, _ = requests[i]
                state.admit(slots[i], params, np.array(prompt, np.int32), ends, outputs[i])
        logits = torch.randn(count, vocab, generator=generator)
        expected = [
            int(reference(row, params, prompt, output, ends[:1]).argmax())
            for row, (params, prompt, _), output in zip(logits, requests, outputs, strict=True)
        ]
        tokens = state.sample(logits, slots, np.array([len(output) for output in outputs])).tokens.tolist()
        assert tokens == expected
        for output, token in zip(outputs, tokens, strict=True):
            output.append(token)


def test_the_next_step_knows_the_token_before_the_host_does():
    """Two steps are sampled without reading the first: the penalty on its token must already act."""
    state = SamplingState(1, VOCAB, "cpu")
    state.admit(0, SamplingParams(temperature=0.0, frequency_penalty=10.0), [1], ())
    logits = torch.zeros(1, VOCAB)
    logits[0, 20], logits[0, 21] = 5.0, 4.0
    slot = np.zeros(1, np.int64)
    launched = [state.sample(logits.clone(), slot, np.array([step])) for step in range(3)]
    assert [int(sampled.tokens) for sampled in launched] == [20, 21, 0]


def test_a_released_slot_leaves_nothing_behind():
    state = SamplingState(1, VOCAB, "cpu")
    everything = SamplingParams(
        temperature=2.0, top_k=5, repetition_penalty=9.0, logit_bias={20: -100.0}, min_tokens=9, logprobs=3
    )
    state.admit(0, everything, [20], (21,))
    state.release(0)
    state.admit(0, SamplingParams(temperature=0.0), [1], (20,))
    logits = torch.zeros(1, VOCAB)
    logits[0, 20] = 5.0
    sampled = state.sample(logits, np.zeros(1, np.int64), np.zeros(1, np.int64))
    assert sampled.tokens.tolist() == [20] and sampled.logprobs is None


def test_history_outgrows_its_first_allocation():
    state = SamplingState(2, VOCAB, "cpu")
    state.admit(0, SamplingParams(temperature=0.0, presence_penalty=100.0), [1], ())
    logits, slot = torch.linspace(0, 1, VOCAB)[None], np.zeros(1, np.int64)
    seen = [int(state.sample(logits.clone(), slot, np.array([step])).tokens) for step in range(VOCAB)]
    assert seen == list(range(VOCAB - 1, -1, -1))


def test_min_tokens_ends_exactly_where_it_says():
    state = SamplingState(1, VOCAB, "cpu")
    state.admit(0, SamplingParams(temperature=1.0, top_k=1, min_tokens=2), [1], (7,))
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 50.0
    tokens = [int(state.sample(logits.clone(), np.zeros(1, np.int64), np.array([s])).tokens) for s in range(4)]
    assert [token == 7 for token in tokens] == [False, False, True, True]


def test_a_biased_token_can_be_forced_and_banned_while_sampling():
    state = SamplingState(2, VOCAB, "cpu")
    state.admit(0, SamplingParams(temperature=1.0, logit_bias={9: 100.0}), [1], ())
    state.admit(1, SamplingParams(temperature=1.0, logit_bias={9: -100.0, 3: 60.0}), [1], ())
    logits = torch.zeros(2, VOCAB)
    logits[:, 9] = 20.0
    sampled = state.sample(logits, np.arange(2), np.zeros(2, np.int64))
    assert sampled.tokens.tolist() == [9, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [{}, {"top_p": 0.9}, {"top_k": 20}, {"top_k": 40, "top_p": 0.8}, {"min_p": 0.05}])
def test_cuda_draws_what_the_cpu_draws(kind):
    """Same uniforms, same order of ranking: only rounding could differ, and these logits are far from ties."""
    params = SamplingParams(
        temperature=1.5, seed=3, repetition_penalty=1.2, frequency_penalty=0.3, logprobs=2, logit_bias={5: 3.0}, **kind
    )
    logits = torch.randn(20, 4, 5000, generator=torch.Generator().manual_seed(0)) * 3
    runs = []
    for device in ("cpu", "cuda"):
        state = SamplingState(4, 5000, device)
        for slot in range(4):
            state.admit(slot, params, [1, 2], (), choice=slot)
        launched = [
            state.sample(step.to(device, copy=True), np.arange(4), np.full(4, index))  # logits are overwritten
            for index, step in enumerate(logits)
        ]
        runs.append(torch.stack([sampled.tokens.cpu() for sampled in launched]))
    assert torch.equal(*runs)
