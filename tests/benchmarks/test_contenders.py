"""The engines that are compared run the same checkpoint and say the same tokens."""

from __future__ import annotations

import random

import pytest
import torch

from sageLLM.benchmarks import workloads
from sageLLM.benchmarks.checkpoints import write_checkpoint
from sageLLM.benchmarks.compare import compare, format_comparison
from sageLLM.benchmarks.contenders import SageLLM, Transformers
from sageLLM.benchmarks.workloads import SHAPES, WORKLOADS, Workload, build_workload

MICRO = {**SHAPES["tiny"], "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 128}  # fmt: skip


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    monkeypatch.setitem(workloads.SHAPES, "micro", MICRO)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def workload():
    chance = random.Random(0)
    requests = [([chance.randrange(100) for _ in range(9)], 6) for _ in range(5)]
    return Workload("micro", "micro", requests)


def test_a_checkpoint_is_an_ordinary_folder(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = write_checkpoint("micro", tmp_path / "one")
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    tensors = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert set(tensors) == set(model.state_dict())
    again = load_file(write_checkpoint("micro", tmp_path / "two") / "model.safetensors")
    other = load_file(write_checkpoint("micro", tmp_path / "three", seed=1) / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert torch.equal(tensors[name], again[name])
    assert not torch.equal(tensors[name], other[name])
    assert tensors[name].float().std() == pytest.approx(0.02, rel=0.1)


def test_both_give_the_same_greedy_tokens(tmp_path, workload):
    folder = write_checkpoint("micro", tmp_path)
    answers = []
    for contender in (SageLLM, Transformers):
        engine = contender(folder, "float32", 1)
        measured, tokens = engine.run(workload)
        engine.close()
        answers.append(tokens)
        assert (measured.engine, measured.workload) == (contender.name, "micro")
        assert (measured.requests, measured.output_tokens) == (5, 30)
        assert measured.seconds > 0
        assert measured.ttft_ms > 0
        assert measured.tpot_ms > 0
    assert answers[0] == answers[1]


def test_compare_from_end_to_end(monkeypatch, workload):
    monkeypatch.setattr("sageLLM.benchmarks.compare.build_workload", lambda name: workload)
    said = []
    (result,) = compare(["micro"], "transformers", "float32", 1, 2, said.append)
    assert result.same_tokens == 1.0
    assert result.speedup == result.peer.seconds / result.ours.seconds
    assert len(said) == 2
    table = format_comparison([result]).splitlines()
    assert [line.split()[1] for line in table[2:4]] == ["sageLLM", "transformers"]


@pytest.mark.parametrize(("name", "requests", "inputs", "outputs"), [
    ("cpu-single", 1, 512, 128), ("cpu-batch", 16, 256, 64), ("cpu-prefix", 16, 512, 32), ("overhead", 256, 64, 32),
])  # fmt: skip
def test_the_workloads_are_fixed(name, requests, inputs, outputs):
    workload = build_workload(name)
    assert name in WORKLOADS
    assert workload == build_workload(name)
    assert len(workload.requests) == requests
    assert workload.input_tokens == requests * inputs
    assert workload.output_tokens == requests * outputs
    assert all(0 <= token < SHAPES[workload.shape]["vocab_size"] for prompt, _ in workload.requests for token in prompt)
    if name == "cpu-prefix":
        assert len({tuple(prompt[:448]) for prompt, _ in workload.requests}) == 1
        assert len({tuple(prompt) for prompt, _ in workload.requests}) == 16
