"""Random checkpoints of a shape, as ordinary Hugging Face folders that every engine reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .workloads import SHAPES

if TYPE_CHECKING:
    from pathlib import Path


def write_checkpoint(shape: str, folder: Path, seed: int = 0) -> Path:
    """Write config.json, tokenizer.json and model.safetensors: bfloat16, normal of std 0.02, norms 1, biases 0."""
    import torch
    from safetensors.torch import save_file

    from ..models.architecture import parse_architecture
    from ..models.weights import expected_tensors

    config = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in expected_tensors(parse_architecture(config)).items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(size, dtype=torch.bfloat16)
        elif name.endswith("bias"):
            tensors[name] = torch.zeros(size, dtype=torch.bfloat16)
        else:
            tensors[name] = torch.empty(size).normal_(std=0.02, generator=generator).to(torch.bfloat16)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    _write_tokenizer(folder, config["vocab_size"])
    return folder


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """One word for each id: the workloads are token ids, but answers are decoded."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
