"""Law 1: greedy output is the same however it was computed, and equals transformers' on the same checkpoint."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sageLLM.backends import detect_backend
from sageLLM.backends.cpu import AVX512Backend
from sageLLM.config import BackendConfig, KVEviction, KVGranularity, ModelConfig, SchedulerPolicy
from sageLLM.errors import RequestError
from sageLLM.kv_runtime.tiers import FileTier, TemperatureClassifier, Watermarks
from sageLLM.models.guide_compiler import GuideCompiler
from sageLLM.models.resolve import resolve_model
from sageLLM.models.tokenizer import load_tokenizer
from sageLLM.models.weights import load_model
from sageLLM.records import Guide, GuideKind, Pooling
from sageLLM.runtime.worker.sampling import SamplingState
from sageLLM.runtime.worker.torch_executor import TorchExecutor


@pytest.fixture(scope="module")
def folder(checkpoint_folder):
    return checkpoint_folder("qwen3")


@pytest.fixture(scope="module")
def loaded(folder):
    backend = detect_backend(BackendConfig(backend_type="cpu", threads=1))
    return load_model(resolve_model(ModelConfig(model_id=str(folder))), backend), backend


@pytest.fixture(scope="module")
def loaded_bfloat16(checkpoint_folder):
    backend = detect_backend(BackendConfig(backend_type="cpu", threads=1))
    if not isinstance(backend, AVX512Backend):
        pytest.skip("no AVX512-bf16, or kernels not compiled")
    folder = checkpoint_folder("qwen3", "bfloat16")
    return load_model(resolve_model(ModelConfig(model_id=str(folder))), backend), backend


@pytest.fixture(scope="module")
def guides(folder):
    model = resolve_model(ModelConfig(model_id=str(folder)))
    return GuideCompiler(model, partial(load_tokenizer, model))


@pytest.fixture(scope="module")
def oracle(folder, guides):
    """transformers' greedy output; each prompt is computed once. With a guide, among the tokens that are found to
    conform by asking of each of them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # nothing is masked, nothing ends
    known = {}

    @cache
    def guided(prompt, guide):
        tokens, matcher = [], guides.new_matcher(guide)
        while len(tokens) < 24 and not matcher.is_stopped():
            forced = matcher.compute_ff_tokens()
            conforming = forced[:1] or [token for token in range(model.vocab_size) if matcher.validate_tokens([token])]
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
            tokens.append(max(conforming, key=logits.tolist().__getitem__))
            if tokens[-1] == EOS:
                break
            matcher = guides.new_matcher(guide)
            assert matcher.consume_tokens(tokens)
        return tokens

    def greedy(prompt, count, guide=None):
        key = tuple(prompt)
        if guide is not None:
            return guided(key, guide)[:count]
        if len(known.get(key, ())) < count:
            ids = torch.tensor([prompt])
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
            )
            known[key] = made[0, len(prompt) :].tolist()
        return known[key][:count]

    return greedy


@pytest.fixture(scope="module")
def hidden_states(folder):
    """transformers' hidden states [T, hidden] of a prompt, after the final norm; each prompt is computed once."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @cache
    def compute(prompt):
        with torch.inference_mode():
            return model(torch.tensor([prompt])).last_hidden_state[0].numpy()

    return compute


def make_bench(
    bench, loaded, guides=None, blocks=64, block_size=4, unit=KVGranularity.LAYER, losing=lambda inner: inner,
    tier_unit=None, nvme=None, **options,
):  # fmt: skip
    """`nvme` is a folder for files below the first worker's pool, of which there may be 40."""
    model, backend = loaded
    slots = 2 * options.get("max_batch_size", 8)  # as many as fair_share may lease

    def make_executor():
        tiers_in = tier_unit or KVGranularity.BLOCK
        made = TorchExecutor(model, backend, blocks, block_size, slots, unit, tier_unit=tiers_in, guides=guides)
        if nvme is not None:
            files = FileTier(nvme, bytes(32), 40, block_size, made.block_io.block_bytes)
            options["tiers"].setdefault("files", files)
        return losing(made)

    executor = make_executor if options.get("mode") == "strict" else make_executor()
    return bench(blocks=blocks, block_size=block_size, executor=executor, **options)


EOS = 1
SCHEMA = '{"type":"object","properties":{"n":{"enum":[7,12,null]},"x":{"type":"array","items":{"type":"boolean"}}}}'
GUIDES = [
    Guide(GuideKind.REGEX, "(yes|no|perhaps)( [0-9]{2,5})*"),
    Guide(GuideKind.JSON_SCHEMA, SCHEMA),
    Guide(GuideKind.GRAMMAR, 'start: NUM (("+" | "-") NUM)*\nNUM: /[0-9]{1,3}/'),
]

# Few prompts that share prefixes, so that mixes hit the cache and transformers computes each only once.
_RNG = random.Random(7)
_BASE = [_RNG.randrange(4, 300) for _ in range(30)]
PROMPTS = [_BASE[:n] + [_RNG.randrange(4, 300) for _ in range(m)] for n, m in
           ((0, 1), (0, 9), (5, 3), (13, 1), (16, 4), (17, 6), (30, 0), (30, 12))]  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_greedy_tokens_do_not_depend_on_how_they_were_computed(
    bench, loaded, guides, oracle, hidden_states, losing_executor, data
):
    """Nor do embeddings."""

    def embed(prompt, pooling):
        hidden = hidden_states(tuple(prompt))
        pooled = hidden.mean(0) if pooling is Pooling.MEAN else hidden[-1]
        return pooled / np.linalg.norm(pooled)

    check_any_mix(bench, loaded, guides, oracle, embed, losing_executor, data)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_our_kernels_keep_that_promise_in_bfloat16(bench, loaded_bfloat16, guides, losing_executor, data):
    """No two roundings of the same sum: what a prompt gives alone and whole, it gives in any mix."""

    def alone(make, *arguments, **options):
        b = make_bench(bench, loaded_bfloat16, guides, max_step_tokens=64)
        sequence = make(b, *arguments, **options)
        b.offer(sequence)
        b.run()
        b.close()
        return sequence

    def greedy(prompt, count, guide):
        eos = (EOS,) if guide else ()
        sequence = alone(bench.sequence, prompt, max_new_tokens=count, guide=guide, eos=eos)
        return sequence.choices[0].output_tokens

    def embed(prompt, pooling):
        return alone(bench.pooled, prompt, pooling).embedding

    check_any_mix(bench, loaded_bfloat16, guides, greedy, embed, losing_executor, data)


MODES = (
    {"mode": "hybrid"},
    {"mode": "time_share"},
    {"mode": "time_share", "prefill_steps": 3, "decode_steps": 1},
    {"mode": "strict"},
    {"mode": "strict", "prefill_workers": 2, "decode_workers": 2},
    {"mode": "strict", "decode_workers": 3},
)


def forget(executor):
    """What is left of a TorchExecutor whose device is gone: it knows no row, and its pool holds other values."""
    executor._thread.submit(int).result()  # it works off what was launched
    executor._sampling = SamplingState(len(executor._newest), executor._model.vocab_size, executor._backend.device)
    executor._newest.zero_()
    executor._guided._rows.clear()
    for kept in (executor._rows, executor._changed, executor._copies, executor._to_admit, executor._to_copy):
        kept.clear()
    executor._kv.fill_(3.0)


TIERS = (None, {"host_blocks": 64}, {"host_blocks": 6})


class TokenCost:
    """Pretends to know: a millisecond for each token. Measured steps correct it."""

    def step_seconds(self, decode_contexts, chunk_starts, chunk_lengths, logit_rows):
        return 1e-3 * (len(decode_contexts) + sum(chunk_lengths))


def check_any_mix(bench, loaded, guides, oracle, embed, losing_executor, data) -> None:
    with TemporaryDirectory() as folder:
        _check_any_mix(bench, loaded, guides, oracle, embed, losing_executor, data, Path(folder))


def _check_any_mix(bench, loaded, guides, oracle, embed, losing_executor, data, folder) -> None:
    often = data.draw(st.sampled_from([0, 0, 0.05]), label="executor lost")
    chance = random.Random(data.draw(st.integers(0, 99), label="when it is lost"))
    tiers = data.draw(st.sampled_from(TIERS), label="tiers")
    in_files = tiers is not None and data.draw(st.booleans(), label="nvme")
    migrates = tiers is not None and data.draw(st.booleans(), label="migration")
    classifier = TemperatureClassifier(0.1, 60.0, time.monotonic) if migrates else None
    slots = data.draw(st.integers(2, 8), label="slots")
    b = make_bench(
        bench,
        loaded,
        guides,
        blocks=data.draw(st.sampled_from([20, 28, 64]), label="blocks"),  # 20 forces preemption
        block_size=data.draw(st.sampled_from([4, 16]), label="block_size"),
        commit=data.draw(st.booleans(), label="prefix cache"),
        max_batch_size=slots,
        max_prefill_batch=data.draw(st.integers(1, min(4, slots)), label="prefill batch"),
        max_decode_batch=data.draw(st.integers(1, slots), label="decode batch"),
        max_step_tokens=data.draw(st.sampled_from([3, 8, 64]), label="step tokens"),
        launch_ahead=data.draw(st.booleans(), label="launch ahead"),
        tpot_slo_ms=data.draw(st.sampled_from([None, 0.5, 8, 30]), label="slo"),  # 0.5 cannot be kept
        step_cost=TokenCost(),
        policy=data.draw(st.sampled_from(SchedulerPolicy), label="policy"),
        kv_cache={
            "eviction": data.draw(st.sampled_from(KVEviction), label="eviction"),
            "ttl_s": data.draw(st.sampled_from([0, 5, 50]), label="ttl"),
        },
        unit=data.draw(st.sampled_from(KVGranularity), label="unit of handover"),
        losing=lambda inner: losing_executor(inner, forget, chance, often),
        slow_doors=data.draw(st.booleans(), label="slow doors"),
        seed=data.draw(st.integers(0, 99), label="order of the workers"),
        tiers=tiers and dict(tiers, watermarks=Watermarks(0.5, 0.2), classifier=classifier),
        swap=data.draw(st.booleans(), label="swap"),
        nvme=folder if in_files else None,
        tier_unit=data.draw(st.sampled_from(KVGranularity), label="unit of tiers") if tiers else None,
        **data.draw(st.sampled_from(MODES), label="mode"),
    )
    wanted = st.integers(1, 24) | st.sampled_from(Pooling)  # so many tokens, or an embedding
    pick = st.tuples(st.sampled_from(PROMPTS), wanted, st.sampled_from([None, None, *GUIDES]))
    picks = data.draw(st.lists(pick, min_size=1, max_size=8))
    n = data.draw(st.sampled_from([1, 1, 2]), label="n")
    pins = data.draw(st.sampled_from([0, 0, 2, 5]), label="every so many pin")
    offered = 0
    for index, (prompt, asked, guide) in enumerate(picks):
        pin = pins > 0 and index % pins == 0
        if isinstance(asked, Pooling):
            sequence = b.pooled(prompt, asked, pin=pin)
        else:
            eos = (EOS,) if guide else ()
            sequence = b.sequence(prompt, max_new_tokens=asked, n=n, pin=pin, guide=guide, eos=eos)
        sequence.request.priority = index % 3
        sequence.request.deadline_ms = 1000.0 - 7 * index if index % 2 else None
        with suppress(RequestError):  # no room for the pin, or beside those before it
            b.offer(sequence)
            offered += 1
    b.run()
    b.close()
    assert len(b.finished) == offered >= (not pins) * len(picks)
    for sequence in b.finished:
        assert sequence.error is None
        prompt, pooling = sequence.prompt_tokens.tolist(), sequence.request.pooling
        if pooling is None:
            expected = oracle(prompt, sequence.sampling.max_new_tokens, sequence.guide)
            assert [c.output_tokens for c in sequence.choices] == [expected] * n
        else:
            np.testing.assert_allclose(sequence.embedding, embed(prompt, pooling), rtol=1e-4, atol=1e-5)
            assert [(c.finish_reason, c.output_tokens) for c in sequence.choices] == [("stop", [])]
    b.check_nothing_leaks()


@pytest.mark.parametrize("granularity", KVGranularity)
@pytest.mark.parametrize("in_files", [False, True])
def test_what_comes_up_from_a_tier_tells_the_same(bench, loaded, oracle, tmp_path, granularity, in_files):
    """Round after round through a pool that holds one prompt; the files are another engine's, in the end."""
    for engine in range(2):
        tiers = {"host_blocks": 4, "watermarks": Watermarks(0.0, 0.0)} if in_files else {"host_blocks": 64}
        nvme = tmp_path if in_files else None
        b = make_bench(
            bench, loaded, blocks=20, max_batch_size=1, tier_unit=granularity, nvme=nvme, tiers=tiers, seed=engine
        )
        for _ in range(3):
            for prompt in (PROMPTS[7], PROMPTS[6][::-1], PROMPTS[5]):
                sequence = b.sequence(prompt, max_new_tokens=8)
                b.offer(sequence)
                b.run()
                assert sequence.choices[0].output_tokens == oracle(prompt, 8)
        stats = b.tiers[0].stats()
        assert (stats.nvme_hit_tokens if in_files else stats.ddr_hit_tokens) > 0
        b.close()
        b.check_nothing_leaks()


def test_a_pool_too_small_for_all_preempts_and_tells_the_same(bench, loaded, oracle):
    b = make_bench(bench, loaded, blocks=20)
    sequences = [b.sequence(prompt, max_new_tokens=24) for prompt in PROMPTS[4:]]
    b.offer(*sequences)
    b.run()
    b.close()
    assert b.worker.preemptions > 0
    for sequence in sequences:
        assert sequence.choices[0].output_tokens == oracle(sequence.prompt_tokens.tolist(), 24)


@pytest.mark.parametrize("host_blocks", [64, 5])
@pytest.mark.parametrize("stumble", [None, "read", "write"])
def test_rows_that_are_swapped_tell_the_same(bench, loaded, oracle, monkeypatch, host_blocks, stumble):
    """Whether there is room for them or not, and if their copies fail."""
    b = make_bench(bench, loaded, blocks=20, tiers={"host_blocks": host_blocks}, swap=True, seed=host_blocks)
    if stumble:
        monkeypatch.setattr(b.executors[0].block_io, stumble, lambda *arguments: 1 / 0)
    sequences = [b.sequence(prompt, max_new_tokens=24) for prompt in PROMPTS[4:]]
    b.offer(*sequences)
    b.run()
    b.close()
    assert b.worker.preemptions > 0
    for sequence in sequences:
        assert sequence.choices[0].output_tokens == oracle(sequence.prompt_tokens.tolist(), 24)
    stats = b.tiers[0].stats()
    assert (stats.ddr_hit_tokens > 0) == (stumble is None and host_blocks == 64)
    assert not b.worker.blocks.swap._kept
    b.check_nothing_leaks()


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(bench, loaded):
    def run(*others):
        b = make_bench(bench, loaded)
        mine = b.sequence(PROMPTS[3], max_new_tokens=16, temperature=1.0, seed=11, n=2)
        b.offer(*(b.sequence(p, max_new_tokens=9, temperature=0.7, seed=i) for i, p in enumerate(others)), mine)
        b.run()
        b.close()
        return [c.output_tokens for c in mine.choices]

    alone = run()
    assert alone[0] != alone[1]
    assert run(*PROMPTS[:5]) == alone


def test_logprobs_are_the_models_own(bench, loaded, folder):
    from transformers import AutoModelForCausalLM

    b = make_bench(bench, loaded, max_step_tokens=4)
    sequence = b.sequence(PROMPTS[5], max_new_tokens=6, logprobs=3, prompt_logprobs=2)
    b.offer(sequence)
    b.run()
    b.close()
    choice = sequence.choices[0]
    tokens = torch.tensor([[*PROMPTS[5], *choice.output_tokens]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(tokens).logits[0].log_softmax(-1)
    length = len(PROMPTS[5])
    for k, told in enumerate(choice.logprobs):
        row = expected[length + k - 1]
        assert told.token == choice.output_tokens[k]
        assert told.logprob == pytest.approx(row[told.token].item(), abs=1e-4)
        assert [t for t, _ in told.top] == row.topk(3).indices.tolist()
    assert sequence.prompt_logprobs[0] is None
    assert len(sequence.prompt_logprobs) == length
    for position, told in enumerate(sequence.prompt_logprobs[1:], start=1):
        assert told.token == PROMPTS[5][position]
        assert told.logprob == pytest.approx(expected[position - 1, told.token].item(), abs=1e-4)
        assert len(told.top) == 2


@pytest.mark.parametrize("lost", ["a copy", "the time", "a step"])
def test_kv_that_does_not_arrive_changes_no_token(bench, loaded, oracle, monkeypatch, lost):
    """Every other copy fails, or all of them are late: the decode worker computes those prompts itself."""
    from sageLLM.runtime.worker import kv_sender

    calls, copy = [], kv_sender.copy_kv

    def stumble(*arguments):
        calls.append(None)
        if lost == "a copy" and len(calls) % 2:
            raise RuntimeError("the test says so")
        copy(*arguments)

    monkeypatch.setattr(kv_sender, "copy_kv", stumble)
    b = make_bench(bench, loaded, mode="strict", max_step_tokens=8)
    if lost == "the time":
        b.executors[0]._sender.timeout_s = 1e-9
    if lost == "a step":
        forward, failing = loaded[0].forward, iter([False, True, False, False, True])
        monkeypatch.setattr(loaded[0], "forward", lambda *a: 1 / 0 if next(failing, False) else forward(*a))
    sequences = [b.sequence(prompt, max_new_tokens=12) for prompt in PROMPTS]
    b.offer(*sequences)
    b.run()
    b.close()
    assert len(b.finished) == len(sequences)
    for sequence in sequences:
        if lost != "a step" or sequence.error is None:
            assert sequence.error is None
            assert sequence.choices[0].output_tokens == oracle(sequence.prompt_tokens.tolist(), 12)
    b.check_nothing_leaks()
