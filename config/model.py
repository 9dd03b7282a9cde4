"""The section `model`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from .base import Config, Positive, Ratio
from .choices import DType, Dtype
from .problems import not_available

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .problems import Contradiction


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

    def contradictions(self) -> Iterator[Contradiction]:
        for name in self.changed("quantization", "quantization_config", "sparsity_pattern", "sparsity_ratio"):
            yield not_available(name, f"model.{name}", "leave it out to run the checkpoint as it is")
