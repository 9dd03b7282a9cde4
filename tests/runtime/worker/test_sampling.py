"""Sampling against outside oracles (transformers' processors, exact probabilities) and against its own promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from sageLLM.errors import RequestError
from sageLLM.records import SamplingParams
from sageLLM.runtime.worker.random_streams import stream_key, uniforms
from sageLLM.runtime.worker.ranking import argmax, rank_all, rank_top
from sageLLM.runtime.worker.sampling import SamplingState

VOCAB = 300


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_logits(rows: int, seed: int = 0, vocab: int = VOCAB, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draw_many(logits: torch.Tensor, params: SamplingParams, count: int, **admit) -> np.ndarray:
    """`count` tokens from one row of logits [V]: the same row at `count` output positions of one stream."""
    state = SamplingState(1, logits.shape[-1], "cpu")
    state.admit(0, params, **({"prompt_tokens": [0], "eos_token_ids": ()} | admit))
    drawn = []
    for start in range(0, count, 1000):
        steps = np.arange(start, min(start + 1000, count))
        tokens = state.sample(logits.repeat(len(steps), 1), np.zeros(len(steps), np.int64), steps).tokens
        drawn.append(tokens.numpy())
    return np.concatenate(drawn)


def assert_follows(drawn: np.ndarray, probs: torch.Tensor) -> None:
    """Chi-square, tokens with few expected counts pooled; the limit is 6 standard deviations above the mean."""
    assert not (probs.numpy()[drawn] == 0).any(), "drew a token that is filtered out"
    expected = probs.double().numpy() * len(drawn)
    observed = np.bincount(drawn, minlength=len(expected))
    rare = expected < 10
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    used = expected > 0
    chi2 = ((observed[used] - expected[used]) ** 2 / expected[used]).sum()
    freedom = used.sum() - 1
    assert chi2 < freedom + 6 * np.sqrt(2 * max(freedom, 1)) + 6, (chi2, freedom)


def oracle_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """transformers' warpers, in the order that sampling.py documents."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    warpers = [hf.TemperatureLogitsWarper(params.temperature)] if params.temperature != 1 else []
    if params.min_p:
        warpers.append(hf.MinPLogitsWarper(params.min_p))
    if params.top_k:
        warpers.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p not in (None, 1.0):
        warpers.append(hf.TopPLogitsWarper(params.top_p))
    scores = logits[None].clone()
    for warper in warpers:
        scores = warper(ids, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=3.0),
        SamplingParams(temperature=0.9, top_k=7),
        SamplingParams(temperature=1.5, top_k=200),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=3.0, top_p=0.97),
        SamplingParams(temperature=0.8, top_p=0.05),
        SamplingParams(temperature=1.2, min_p=0.1),
        SamplingParams(temperature=3.0, min_p=0.01),
        SamplingParams(temperature=1.3, top_k=20, top_p=0.8),
        SamplingParams(temperature=1.5, top_k=200, top_p=0.9, min_p=0.01),
        SamplingParams(temperature=1.5, top_p=0.9, min_p=0.05),
        SamplingParams(temperature=1.5, top_k=10, top_p=0.9, min_p=0.05),
    ],
    ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}-min{p.min_p}",
)
def test_draws_follow_transformers_distribution(params):
    logits = make_logits(1, seed=5)[0]
    drawn = draw_many(logits, params, 6000)
    assert_follows(drawn, oracle_probs(logits, params))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 2, 5, 130, 250, 1000]),
    top_p=st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.001, 0.2, 1.0]),
)
def test_filters_keep_exactly_transformers_tokens(seed, temperature, top_k, top_p, min_p):
    """With a uniform that walks over [0, 1), exactly the tokens that transformers keeps can be drawn."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    logits = make_logits(1, seed=seed, vocab=40)[0]
    probs = oracle_probs(logits, params)
    drawn = draw_many(logits, params, 1500)
    assert not (probs.numpy()[drawn] == 0).any()
    likely = {int(token) for token in (probs > 0.02).nonzero()[:, 0]}
    assert likely <= set(drawn.tolist())


def test_greedy_is_argmax_and_first_of_ties():
    logits = make_logits(5)
    logits[2, 10] = logits[2, 250] = 99.0
    state = SamplingState(5, VOCAB, "cpu")
    for slot in range(5):
        state.admit(slot, SamplingParams(temperature=0.0), [1], ())
    sampled = state.sample(logits, np.arange(5), np.zeros(5, np.int64))
    assert sampled.tokens.tolist() == logits.argmax(-1).tolist()
    assert sampled.tokens[2] == 10
    assert sampled.logprobs is None and sampled.top_ids is None


def test_an_all_greedy_batch_touches_nothing_but_argmax(monkeypatch):
    state = SamplingState(2, VOCAB, "cpu")
    for slot in range(2):
        state.admit(slot, SamplingParams(temperature=0.0, top_k=5, top_p=0.5), [1], ())
    logits = make_logits(2).bfloat16()
    before = logits.clone()
    monkeypatch.setattr(torch.Tensor, "float", lambda self: pytest.fail("made a float copy"))
    assert state.sample(logits, np.arange(2), np.zeros(2, np.int64)).tokens.tolist() == before.argmax(-1).tolist()
    assert torch.equal(logits, before)


def test_an_empty_step_samples_nothing():
    sampled = SamplingState(2, VOCAB, "cpu").sample(torch.empty(0, VOCAB), np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert sampled.tokens.shape == (0,)


MIXED = st.lists(
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 20, 150]),
        top_p=st.sampled_from([0.5, 0.95, 1.0]),
        min_p=st.sampled_from([0.0, 0.05]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        frequency_penalty=st.sampled_from([0.0, 0.7]),
        logit_bias=st.sampled_from([None, {3: 5.0}, {1: -100.0, 2: 1.5, 250: 4.0}]),
        min_tokens=st.sampled_from([0, 3]),
        stop_token_ids=st.sampled_from([(), (5, 9)]),
        logprobs=st.sampled_from([None, 0, 3]),
        seed=st.integers(0, 2**64),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(requests=MIXED, order=st.randoms(use_true_random=False), vocab=st.sampled_from([50, 300, 8192]))
def test_a_row_does_not_depend_on_the_batch(requests, order, vocab):
    """Each request alone in slot 0, and all together in shuffled slots and row order: identical tokens and logprobs."""
    requests = [r if vocab > 250 or not r.logit_bias else SamplingParams(seed=r.seed, top_p=0.9) for r in requests]
    steps = 4
    logits = [make_logits(steps, seed=7 + i, vocab=vocab).bfloat16().float() for i in range(len(requests))]  # ties

    def run(members: list[int], slot_of: dict[int, int]) -> dict[int, list]:
        state = SamplingState(8, vocab, "cpu")
        for i in members:
            state.admit(slot_of[i], requests[i], [1, 2, 3 + i], (4,))
        out: dict[int, list] = {i: [] for i in members}
        for step in range(steps):
            order.shuffle(members)
            batch = torch.stack([logits[i][step] for i in members])
            slots = np.array([slot_of[i] for i in members])
            sampled = state.sample(batch, slots, np.full(len(members), step))
            for row, i in enumerate(members):
                entry = [int(sampled.tokens[row])]
                if requests[i].logprobs is not None:
                    k = requests[i].logprobs
                    entry += [float(sampled.logprobs[row]), sampled.top_ids[row, :k].tolist()]
                    entry += sampled.top_logprobs[row, :k].tolist()
                out[i].append(entry)
        return out

    together = run(list(range(len(requests))), dict(enumerate(order.sample(range(8), len(requests)))))
    for i in range(len(requests)):
        assert run([i], {i: 0})[i] == together[i]


def test_large_rows_do_not_depend_on_the_batch_or_threads():
    """Sizes at which torch vectorises and splits reductions over threads."""
    vocab, rows = 151_936, 5
    kinds = [{}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}, {"min_p": 0.02}, {"top_p": 0.999}]
    params = [SamplingParams(temperature=0.9, seed=i, logprobs=2, **kind) for i, kind in enumerate(kinds)]
    logits = make_logits(rows, vocab=vocab, scale=4.0)
    step = np.full(rows, 11)

    def run(members: list[int]) -> list[tuple]:
        state = SamplingState(rows, vocab, "cpu")
        for i in members:
            state.admit(i, params[i], [1], ())
        sampled = state.sample(logits[members], np.array(members), step[: len(members)])
        return list(zip(sampled.tokens.tolist(), sampled.logprobs.tolist(), sampled.top_ids.tolist(), strict=True))

    together = run(list(range(rows)))
    assert [run([i])[0] for i in range(rows)] == together
    assert run([3, 0, 4, 2, 1]) == [together[i] for i in (3, 0, 4, 2, 1)]
    torch.set_num_threads(2)
    assert run(list(range(rows))) == together
    assert [run([i])[0] for i in range(rows)] == together


def test_streams_differ_by_seed_choice_and_step_and_are_uniform():
    keys = {stream_key(seed, choice) for seed in range(-50, 50) for choice in range(20)}
    assert len(keys) == 2000
    assert stream_key(3, 0) == stream_key(3 + 2**64, 0)
    key = np.array([stream_key(42, 0)], np.uint64)
    drawn = uniforms(np.repeat(key, 20_000), np.arange(20_000))
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=50, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 49 + 6 * np.sqrt(98)
    across = uniforms(np.array([stream_key(seed, 0) for seed in range(20_000)], np.uint64), np.zeros(20_000, np.int64))
    counts = np.histogram(across, bins=50, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 49 + 6 * np.sqrt(98)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.04


def test_splitmix64_equals_its_reference_output():
    """Reference sequence of SplitMix64 seeded with 1234567 (Vigna's splitmix64.c)."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    got = uniforms(np.full(3, 1234567, np.uint64), np.arange(3))
    assert got.tolist() == [(value >> 11) * 2.0**-53 for value in expected]


def test_choices_of_one_seeded_request_differ_and_unseeded_requests_differ():
    logits = make_logits(1, scale=0.1)[0]
    params = SamplingParams(temperature=1.0, seed=1)
    first, again = draw_many(logits, params, 50, choice=0), draw_many(logits, params, 50, choice=0)
    other = draw_many(logits, params, 50, choice=1)
    assert (first == again).all() and (first != other).any()
    unseeded = SamplingParams(temperature=1.0)
    assert (draw_many(logits, unseeded, 50) != draw_many(logits, unseeded, 50)).any()


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([-3.0, -0.0, 0.0, 1.0, 1.5, 9.0, -torch.inf]), min_size=1, max_size=700),
    k=st.integers(1, 20),
)
def test_ranking_equals_a_stable_sort_whatever_k(values, k):
    row = torch.tensor([values, values[::-1]])
    expected = torch.sort(row, dim=-1, descending=True, stable=True)
    assert torch.equal(rank_all(row)[1], expected.indices)
    got_values, got_ids = rank_top(row, k)
    assert torch.equal(got_ids, expected.indices[:, :k])
    assert torch.equal(got_values, expected.values[:, :k])
    assert argmax(row).tolist() == expected.indices[:, 0].tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("logit_bias", {VOCAB: 1.0}),
        ("logit_bias", {0: float("nan")}),
        ("stop_token_ids", (-1,)),
        ("min_tokens", 500),
        ("max_new_tokens", 0),
        ("n", 0),
        ("logprobs", -1),
        ("prompt_logprobs", VOCAB + 1),
        ("stop", ("a", "")),
    ],
)
def test_meaningless_parameters_are_refused_by_name(field, value):
    with pytest.raises(RequestError, match=field):
        SamplingState(1, VOCAB, "cpu").admit(0, SamplingParams(**{field: value}), [1], ())
