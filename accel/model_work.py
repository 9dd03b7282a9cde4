"""What the parts of a decoder's step cost in FLOPs and bytes, from the model's dimensions alone.

T tokens of a step. A product with a weight of n elements is 2 n FLOPs a token; attention is 4 H D FLOPs for each
pair of a token and one it sees (Narayanan et al., "Efficient large-scale language model training on GPU clusters",
SC 2021, appendix). An element that is copied, scaled or compared counts as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .execution_graph import NodeKind

Number = TypeVar("Number", float, NDArray[np.float64])


class ModelShape(Protocol):
    """The dimensions of a decoder; `models.architecture.DecoderConfig` is one."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


class ParallelShape(Protocol):
    """Over how many devices a layer, and the layers, are split; `config.BackendConfig` is one."""

    @property
    def tensor_parallel_size(self) -> int: ...
    @property
    def pipeline_parallel_size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ModelDimensions:
    """A `ModelShape` by itself."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Parallelism:
    """A `ParallelShape` by itself."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1


class RowWork(NamedTuple):
    """Work that follows the number of rows: FLOPs a row, bytes whatever the rows (weights), bytes a row."""

    flops: float
    fixed_bytes: float
    row_bytes: float
    row_output_bytes: int


class ModelWork:
    """The work of one rank of a model: `rows[kind]` for what follows the rows; attention by its methods.

    `element_bytes` is the size of a weight, an activation or an element of KV.
    """

    def __init__(self, model: ModelShape, parallel: ParallelShape | None = None, element_bytes: int = 2) -> None:
        tp = 1 if parallel is None else parallel.tensor_parallel_size
        if model.num_heads % tp or model.intermediate_size % tp:
            raise ValueError(
                f"tensor_parallel_size {tp} does not divide {model.num_heads} heads and "
                f"intermediate size {model.intermediate_size}"
            )
        size, hidden = element_bytes, model.hidden_size
        heads, kv_heads = model.num_heads // tp, max(1, model.num_kv_heads // tp)
        q_width, kv_width = heads * model.head_dim, kv_heads * model.head_dim
        qkv_width, inner, vocab = q_width + 2 * kv_width, model.intermediate_size // tp, -(-model.vocab_size // tp)
        self.hidden_bytes = size * hidden  # of one token between layers
        self.kv_bytes_per_layer = 2 * size * kv_width  # of one token
        self.kv_bytes_per_token = self.kv_bytes_per_layer * model.num_layers
        self.logit_bytes = size * vocab
        self._q_bytes = size * q_width
        self._pair_flops = 4 * heads * model.head_dim

        def product(depth: int, width: int, *, out: int | None = None) -> RowWork:
            out = width if out is None else out
            return RowWork(2.0 * depth * width, float(size * depth * width), float(size * (depth + out)), size * out)

        gate_up, down = product(hidden, 2 * inner, out=inner), product(inner, hidden)
        self.rows: dict[NodeKind, RowWork] = {
            NodeKind.EMBEDDING: RowWork(float(hidden), 0.0, 2.0 * self.hidden_bytes, self.hidden_bytes),
            NodeKind.LAYERNORM: RowWork(4.0 * hidden, 0.0, 4.0 * self.hidden_bytes, 2 * self.hidden_bytes),
            NodeKind.QKV_PROJ: product(hidden, qkv_width),
            NodeKind.OUT_PROJ: product(q_width, hidden),
            NodeKind.FFN: RowWork(
                gate_up.flops + down.flops,
                gate_up.fixed_bytes + down.fixed_bytes,
                gate_up.row_bytes + down.row_bytes,
                self.hidden_bytes,
            ),
            NodeKind.LM_HEAD: product(hidden, vocab),
            NodeKind.SAMPLE: RowWork(float(model.vocab_size), 0.0, float(size * model.vocab_size), 8),
        }

    def decode_attention(self, rows: int, tokens: Number) -> tuple[Number, Number]:
        """(FLOPs, bytes) of a layer's attention of `rows` tokens to `tokens` of KV, summed over the rows."""
        return self._pair_flops * tokens, self.kv_bytes_per_layer * tokens + 2 * self._q_bytes * rows

    def prefill_attention(self, start: int, length: int) -> tuple[float, float]:
        """(FLOPs, bytes) of a layer's attention of tokens [start, start + length) of a prompt, each to those before
        it and itself."""
        seen = length * start + length * (length + 1) / 2
        return self._pair_flops * seen, self.kv_bytes_per_layer * (start + length) + 2.0 * self._q_bytes * length

    def attention_output_bytes(self, rows: int) -> int:
        """What a layer's attention of `rows` tokens leaves in memory."""
        return self._q_bytes * rows
