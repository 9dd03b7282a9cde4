"""Model shapes and request lists on which engines are compared: seeded, engine-neutral, prompts are token ids."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "use_sliding_window": False,
    "sliding_window": None,
}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        **_QWEN2,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **_QWEN2,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 688,
        "vocab_size": 4096,
        "tie_word_embeddings": False,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


@dataclass(frozen=True, slots=True)
class Workload:
    """`requests` are (prompt token ids, output length); EOS is ignored, decoding is greedy."""

    name: str
    shape: str
    requests: list[tuple[list[int], int]]

    @property
    def input_tokens(self) -> int:
        return sum(len(prompt) for prompt, _ in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(length for _, length in self.requests)


WORKLOADS = ("cpu-single", "cpu-batch", "cpu-prefix", "overhead")


def build_workload(name: str) -> Workload:
    """One of WORKLOADS, the same requests each time.

    Raises:
        KeyError: no such workload.
    """
    rng = random.Random(0)
    shape = "tiny" if name == "overhead" else "qwen2.5-0.5b"
    limit = min(SHAPES[shape]["vocab_size"], 100_000)

    def tokens(count: int) -> list[int]:
        return [rng.randint(0, limit - 1) for _ in range(count)]

    if name == "cpu-single":  # one stream: TTFT, then TPOT against the bandwidth floor
        return Workload(name, shape, [(tokens(512), 128)])
    if name == "cpu-batch":
        return Workload(name, shape, [(tokens(256), 64) for _ in range(16)])
    if name == "cpu-prefix":  # sixteen requests share 448 tokens; the cache is empty at the start
        shared = tokens(448)
        return Workload(name, shape, [(shared + tokens(64), 32) for _ in range(16)])
    if name == "overhead":  # a tiny model: what is left is the engine itself
        return Workload(name, shape, [(tokens(64), 32) for _ in range(256)])
    raise KeyError(name)
