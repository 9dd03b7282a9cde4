"""Fixtures for the whole tree: small random Hugging Face checkpoints, written by transformers itself."""

from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--soak-minutes", type=float, default=2.0, help="how long tests/soak runs")


def pytest_collection_finish():
    """Modules and tests live to the end: looking for cyclic garbage among them took a tenth of the time."""
    gc.freeze()


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] | trim + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

# name -> (transformers' model type, what differs from the common small dimensions)
CHECKPOINTS = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama3-tied": ("llama", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 32}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                                 "original_max_position_embeddings": 64}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-mha": ("qwen3", {"head_dim": 16, "num_key_value_heads": 4}),
}  # fmt: skip


def _train_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = ["the quick brown fox jumps over the lazy dog", "What does heapq.heappush do?", "héllo 你好 😀"] * 4
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "normalized": False,
                      "single_word": False, "special": True},
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def write_checkpoint(folder: Path, name: str, dtype: str = "float32") -> Path:
    """One of CHECKPOINTS as an ordinary folder: config, weights, tokenizer, chat template, generation config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = _train_tokenizer(folder)
    model_type, changes = CHECKPOINTS[name]
    sizes = {
        "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": vocab_size, "max_position_embeddings": 256, "bos_token_id": 0,
        "eos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Random norms and biases too: left at 1 and 0 they would hide a mistake.
            if key.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.15)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory):
    """A function (name, dtype="float32") -> folder of a small random checkpoint; written once per session."""
    known: dict[tuple[str, str], Path] = {}

    def folder_of(name: str, dtype: str = "float32") -> Path:
        if (name, dtype) not in known:
            known[name, dtype] = write_checkpoint(tmp_path_factory.mktemp(f"{name}-{dtype}"), name, dtype)
        return known[name, dtype]

    return folder_of


@pytest.fixture(scope="session")
def checkpoint_names() -> list[str]:
    """The names that `checkpoint_folder` knows."""
    return list(CHECKPOINTS)


class LosingExecutor:
    """An executor that is lost where `chance` says so: then `forget(inner)`, and in a few polls it is back.

    `often` is the probability for each launch, result, poll and start. It is lost twice in a row at most, and nobody is
    suspected of it.
    """

    def __init__(self, inner, forget, chance, often):
        self.losses = 0
        self._inner, self._forget, self._chance, self._often = inner, forget, chance, often
        self._launched = []
        self._lost = False
        self._polls_to_start = 0
        self._in_a_row = 0
        self._changes = []

    def _stumble(self):
        from sageLLM.errors import ExecutorLostError

        if self._in_a_row < 2 and self._chance.random() < self._often:
            for handle in self._launched:
                handle.result()  # its exports are done
            self._launched.clear()
            self._changes.clear()
            self._forget(self._inner)
            self._lost = True
            self._polls_to_start = self._chance.randint(0, 3)
            self._in_a_row += 1
            self.losses += 1
            raise ExecutorLostError("the test says so")

    @property
    def pool(self):
        return self._inner.pool

    @property
    def block_io(self):
        return self._inner.block_io

    @property
    def before_step(self):
        return self._inner.before_step

    @before_step.setter
    def before_step(self, flush):
        self._inner.before_step = flush

    def connect(self, peers):
        self._inner.connect(peers)

    def ready(self):
        if self._lost and self._polls_to_start:
            self._polls_to_start -= 1
            return False
        self._stumble()
        self._lost = False
        return True

    def admit(self, slot, sequence, choice):
        self._changes.append(("admit", slot, sequence, choice))

    def readmit(self, slot, outputs):
        self._changes.append(("readmit", slot, outputs.copy()))

    def release(self, slot):
        self._changes.append(("release", slot))

    def launch(self, plan):
        assert not self._lost
        self._stumble()
        for method, *arguments in self._changes:
            getattr(self._inner, method)(*arguments)
        self._changes.clear()
        handle = self._inner.launch(plan)
        self._launched.append(handle)
        return _LosingHandle(self, handle)

    def take(self, handle):
        assert handle in self._launched, "a step of an executor that was lost is asked for its result"
        self._stumble()
        self._launched.remove(handle)
        self._in_a_row = 0
        return handle.result()

    def close(self):
        self._inner.close()


class _LosingHandle:
    def __init__(self, executor, handle):
        self._executor, self._handle = executor, handle

    def result(self):
        return self._executor.take(self._handle)


@pytest.fixture
def losing_executor(monkeypatch):
    """`losing_executor(inner, forget, chance, often)`: see LosingExecutor."""
    from sageLLM.runtime.worker import losses

    monkeypatch.setattr(losses, "MAX_LOSSES", 10**9)
    return LosingExecutor
