"""Every family computes what transformers computes on the same checkpoint."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from sageLLM.backends.cpu import AVX512Backend, CPUBackend
from sageLLM.backends.cpu.capability import CPUCapability
from sageLLM.backends.torch_ops import TorchBackend

FAMILIES = [
    "llama2", "llama3", "llama3-tied", "llama-bias", "llama-linear", "llama-yarn", "mistral", "qwen2", "qwen2-untied",
    "qwen3", "qwen3-mha",
]  # fmt: skip


def tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, 300) for _ in range(count)]


def reference(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def reference_greedy(model, prompt: list[int], count: int) -> list[int]:
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


BFLOAT16_BACKENDS = {
    "cpu": CPUBackend(CPUCapability(native_bfloat16=True, half_weights=True, onednn=True)),
    "torch": TorchBackend(torch.device("cpu")),
}
if CPUCapability.probe().kernels:
    BFLOAT16_BACKENDS["avx512"] = AVX512Backend()


def test_every_checkpoint_is_compared(checkpoint_names):
    assert sorted(checkpoint_names) == sorted(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers_in_float32(name, checkpoint_folder, load, paged_runner):
    folder = checkpoint_folder(name)
    expected_model, model = reference(folder), load(folder)
    prompt = tokens(150)  # longer than the 64 positions that the scaled ropes were "trained" on

    with torch.inference_mode():
        expected = expected_model(torch.tensor([prompt])).logits[0]
    runner = paged_runner(model)
    torch.testing.assert_close(runner.step([(runner.add(), prompt)]), expected, atol=1e-4, rtol=1e-4)

    assert paged_runner(model).generate(prompt, 12) == reference_greedy(expected_model, prompt, 12)


@pytest.mark.parametrize("backend", BFLOAT16_BACKENDS.values(), ids=BFLOAT16_BACKENDS)
@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "qwen3"])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(name, backend, checkpoint_folder, load, paged_runner):
    """Two roundings of the same sums: ours is no further from float32 than transformers' own bfloat16, the greedy
    tokens agree with float32's as often, and where they do not it was a near tie."""
    folder = checkpoint_folder(name, "bfloat16")
    theirs, model = reference(folder), load(folder, backend, dtype="bfloat16")
    exact = copy.deepcopy(theirs).to(torch.float32)
    agreed = theirs_agreed = 0
    errors = torch.zeros(2)
    for seed in range(4):
        prompt = tokens(40, seed)
        runner = paged_runner(model)
        mine = runner.step([(runner.add(), prompt)])
        with torch.inference_mode():
            expected, other = (m(torch.tensor([prompt])).logits[0].float() for m in (exact, theirs))
        errors += torch.stack([(mine - expected).norm(), (other - expected).norm()])
        best, top = mine.argmax(-1), expected.max(-1).values
        agreed += int((best == expected.argmax(-1)).sum())
        theirs_agreed += int((other.argmax(-1) == expected.argmax(-1)).sum())
        lost = top - expected.gather(1, best[:, None])[:, 0]
        assert float(lost.max()) < 0.08 * float(expected.std())
    assert agreed >= 0.95 * theirs_agreed
    assert errors[0] <= 1.03 * errors[1]


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_a_prompt_in_chunks_gives_the_same_tokens_as_whole(name, chunk, checkpoint_folder, load, paged_runner):
    model = load(checkpoint_folder(name))
    prompt = tokens(23)
    whole = paged_runner(model).generate(prompt, 8)
    assert paged_runner(model).generate(prompt, 8, chunk=chunk) == whole


def test_decodes_and_a_prompt_chunk_in_one_step_do_not_mix(checkpoint_folder, load, paged_runner):
    model = load(checkpoint_folder("qwen2"))
    prompts = [tokens(9, 1), tokens(14, 2), tokens(21, 3)]
    alone = []
    for prompt in prompts:
        runner = paged_runner(model)
        alone.append(runner.step([(runner.add(), prompt)])[-1])

    runner = paged_runner(model)
    first, second, third = (runner.add() for _ in range(3))
    runner.step([(first, prompts[0][:-1]), (second, prompts[1][:-1])])
    logits = runner.step(
        [(first, prompts[0][-1:]), (second, prompts[1][-1:]), (third, prompts[2])], [0, 1, 1 + len(prompts[2])]
    )
    torch.testing.assert_close(logits, torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_only_the_wanted_rows_reach_the_head(checkpoint_folder, load, paged_runner):
    model = load(checkpoint_folder("llama2"))
    prompt = tokens(10)
    runner = paged_runner(model)
    every = runner.step([(runner.add(), prompt)])
    some = runner.step([(runner.add(), prompt)], [9, 4])
    assert every.shape == (10, model.vocab_size)
    assert some.dtype == torch.float32
    torch.testing.assert_close(some, every[[9, 4]], atol=1e-5, rtol=1e-5)


def test_the_model_says_what_its_pool_must_be(checkpoint_folder, load):
    model = load(checkpoint_folder("llama3"))
    assert model.kv_shape(10, 4) == (10, 3, 2, 2, 4, 16)
    assert (model.kv_dtype, model.max_seq_len) == (torch.float32, 256)
