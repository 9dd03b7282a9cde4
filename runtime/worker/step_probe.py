"""A stopwatch inside the model: which part of a step took how long."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from ...accel.execution_graph import NodeKind

if TYPE_CHECKING:
    from torch import Tensor

    from ...backends.base import Linear, StepLayout
    from ...models.decoder import DecoderModel

STEP = "step"  # what belongs to no node


class StepProbe:
    """Takes a model's place between it and its backend, and notes the seconds of each kind of node by its rows.

    What lies between two operations counts with the second. `seconds` and `counts` are of the steps since `reset`.
    While `stopped`, the model runs as fast as it does without.
    """

    def __init__(self, model: DecoderModel) -> None:
        self._backend = model.backend
        self._attention = NodeKind.DECODE_ATTN
        self._first_norm = False
        self.stopped = False
        self.reset()
        model.backend = self
        model.lm_head = _ProbedLinear(self, model.lm_head, NodeKind.LM_HEAD)
        for layer in model.layers:
            layer.qkv = _ProbedLinear(self, layer.qkv, NodeKind.QKV_PROJ)
            layer.output = _ProbedLinear(self, layer.output, NodeKind.OUT_PROJ)
            layer.gated = _ProbedLinear(self, layer.gated, NodeKind.FFN)
            layer.down = _ProbedLinear(self, layer.down, NodeKind.FFN, 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def reset(self) -> None:
        """Start the watch."""
        self.seconds: dict[tuple[NodeKind | str, int], float] = defaultdict(float)
        self.counts: dict[tuple[NodeKind | str, int], int] = defaultdict(int)
        self._last = time.perf_counter()

    def mark(self, kind: NodeKind | str, rows: int, count: int = 1) -> None:
        """What ran since the last mark was that. `count` 0: a part of a node that is counted elsewhere."""
        if self.stopped:
            return
        self._backend.synchronize()
        now = time.perf_counter()
        self.seconds[kind, rows] += now - self._last
        self.counts[kind, rows] += count
        self._last = now

    # -- the backend's operations that a step calls ------------------------------------------------------------------

    def plan_attention(self, layout: StepLayout, kv: Tensor, num_heads: int) -> Any:
        plan = self._backend.plan_attention(layout, kv, num_heads)
        self._attention = NodeKind.DECODE_ATTN if layout.num_decodes else NodeKind.PREFILL_ATTN
        self._first_norm = True
        self.mark(STEP, 0)
        return plan

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, layer: int, plan: Any, scale: float) -> Tensor:
        attended = self._backend.attend(q, k, v, kv, layer, plan, scale)
        self.mark(self._attention, len(q))
        return attended

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed = self._backend.rms_norm(x, weight, eps)
        if self._first_norm:  # with what comes before it
            self._first_norm = False
            self.mark(NodeKind.EMBEDDING, len(x))
        else:
            self.mark(NodeKind.QKV_PROJ, len(x), 0)
        return normed

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed = self._backend.add_rms_norm(x, residual, weight, eps)
        self.mark(NodeKind.LAYERNORM, len(x))
        return normed

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated = self._backend.apply_rope(x, cos, sin)
        self.mark(NodeKind.QKV_PROJ, len(x), 0)
        return rotated


class _ProbedLinear:
    """A product and a mark."""

    def __init__(self, probe: StepProbe, linear: Linear, kind: NodeKind, count: int = 1) -> None:
        self._probe = probe
        self._linear = linear
        self._kind = kind
        self._count = count

    def __call__(self, x: Tensor) -> Tensor:
        y = self._linear(x)
        self._probe.mark(self._kind, len(x), self._count)
        return y
