"""One decoder for every family: Llama, Mistral, Qwen2 and Qwen3 differ in biases, head norms and rope only.

Shape letters: T tokens of a step, R rows that are wanted, H query heads, K kv heads, D head dim, V vocabulary,
N blocks of the pool, L layers, P tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rope import build_rope_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..backends.base import Backend, Linear, StepLayout
    from .architecture import DecoderConfig


@dataclass(slots=True, eq=False)
class DecoderLayer:
    """One layer's parameters, packed: q, k and v in one matrix, gate and up in another."""

    input_norm: Tensor  # [hidden]
    qkv: Linear  # hidden -> (H + 2K) * D
    qk_norm: Tensor | None  # [H + K, D], for each head of q and k
    output: Linear  # H * D -> hidden
    mlp_norm: Tensor  # [hidden]
    gated: Linear  # hidden -> intermediate: silu(gate) * up
    down: Linear  # intermediate -> hidden
    next_norm: Tensor  # [hidden], the next layer's input_norm; after the last layer the model's final norm


class DecoderModel:
    """A loaded decoder on one device. Built by `weights.load_model`."""

    def __init__(
        self,
        config: DecoderConfig,
        backend: Backend,
        dtype: torch.dtype,
        embedding: Tensor,
        layers: list[DecoderLayer],
        lm_head: Linear,
    ) -> None:
        self.config = config
        self.backend = backend
        self.kv_dtype = dtype
        self.num_layers = config.num_layers
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.vocab_size = config.vocab_size
        self.max_seq_len = config.max_seq_len
        self._embedding = embedding
        self.layers = layers
        self.lm_head = lm_head
        self._cos, self._sin = build_rope_table(config.rope, config.head_dim, config.max_seq_len, dtype, backend.device)

    def kv_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """The shape of a pool [N, L, 2, K, P, D] for `Backend.allocate_kv`."""
        return (num_blocks, self.num_layers, 2, self.num_kv_heads, block_size, self.head_dim)

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        layout: StepLayout,
        kv: Tensor,
        rows: Tensor | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Run one step: write the K and V of its tokens to the pool, return their hidden states after the final norm.

        Args:
            input_ids: [T] int64, on the host or the device.
            layout: how the tokens lie; see `StepLayout`.
            kv: the pool [N, L, 2, K, P, D], updated in place.
            rows: [R] int64, the tokens of the step whose hidden states are wanted; None is all of them.
            on_layer: called with each layer's number when its K and V are written (on a GPU: queued).

        Returns:
            Hidden states [R, hidden] in the model's dtype, on the device.
        """
        backend, config = self.backend, self.config
        device = backend.device
        num_heads, num_kv_heads, head_dim, eps = (
            config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps
        )  # fmt: skip
        qk_heads = num_heads + num_kv_heads
        widths = [qk_heads * head_dim, num_kv_heads * head_dim]
        scale = head_dim**-0.5
        tokens = input_ids.shape[0]
        last = self.num_layers - 1

        plan = backend.plan_attention(layout, kv, num_heads)
        positions = layout.positions.to(device, non_blocking=True)
        cos, sin = self._cos[positions], self._sin[positions]
        if rows is not None:
            rows = rows.to(device, non_blocking=True)
        hidden = self._embedding[input_ids.to(device, non_blocking=True)].to(self.kv_dtype)
        x = backend.rms_norm(hidden, self.layers[0].input_norm, eps)
        for index, layer in enumerate(self.layers):
            qk, v = torch.split(layer.qkv(x), widths, dim=-1)
            qk = qk.view(tokens, qk_heads, head_dim)
            if layer.qk_norm is not None:
                qk = backend.rms_norm(qk, layer.qk_norm, eps)
            qk = backend.apply_rope(qk, cos, sin)
            q, k = qk[:, :num_heads], qk[:, num_heads:]
            attended = backend.attend(q, k, v.view(tokens, num_kv_heads, head_dim), kv, index, plan, scale)
            if on_layer is not None:
                on_layer(index)
            attended = attended.reshape(tokens, num_heads * head_dim)
            if index == last and rows is not None:
                attended, hidden = attended[rows], hidden[rows]
            x, hidden = backend.add_rms_norm(layer.output(attended), hidden, layer.mlp_norm, eps)
            x = layer.down(layer.gated(x))
            x, hidden = backend.add_rms_norm(x, hidden, layer.next_norm, eps)
        return x

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, V] in float32 of what `forward` returned [R, hidden]."""
        return self.lm_head(hidden).float()
