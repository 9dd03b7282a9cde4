"""The section `model`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from .base import Config, Positive, Ratio, refuse
from .choices import DType, Dtype


class ModelConfig(Config):
    """Which model, and its dimensions where no checkpoint gives them.

    `model_id` is a Hugging Face folder, a hub id (then `revision` may say which), `builtin:pydoc-tiny` or
    `builtin:null`. The five dimensions are needed only for an id that resolves to nothing: they build random weights,
    as `load_format: dummy` does for a checkpoint's dimensions; `seed` is that of random weights.
    """

    model_id: str = "builtin:pydoc-tiny"
    revision: str | None = None
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    num_layers: Positive | None = None
    num_heads: Positive | None = None
    hidden_size: Positive | None = None
    vocab_size: Positive | None = None
    max_seq_len: Positive | None = None
    dtype: Dtype = DType.AUTO
    seed: int = 0
    quantization: str | None = None
    quantization_config: dict[str, Any] | None = None
    sparsity_pattern: str | None = None
    sparsity_ratio: Ratio = 0.0

    @model_validator(mode="after")
    def _available(self) -> ModelConfig:
        refuse(self.quantization is not None, "model.quantization", "leave it out to run the checkpoint's own dtype")
        refuse(self.quantization_config is not None, "model.quantization_config", "leave it out")
        refuse(self.sparsity_pattern is not None, "model.sparsity_pattern", "leave it out")
        refuse(self.sparsity_ratio > 0, "model.sparsity_ratio", "leave it at 0")
        return self
