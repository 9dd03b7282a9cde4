"""Builds the execution graph of one step, as the decoder computes it: see `models/decoder.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .execution_graph import ExecutionGraph, Node, NodeKind
from .model_work import ModelWork, Parallelism

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .model_work import ModelShape, ParallelShape


@dataclass(frozen=True, slots=True)
class KVMove:
    """KV of `tokens` tokens that the step loads from a lower tier, stores in one, or hands to another worker."""

    kind: Literal[NodeKind.KV_LOAD, NodeKind.KV_STORE, NodeKind.KV_MIGRATE]
    tokens: int
    link: str  # "ddr", "nvme", "handover"


class ExecutionGraphBuilder:
    """Graphs of a model's steps, for one rank of each pipeline stage.

    `decode_contexts` are the tokens that each decoding row attends to, its new one included; a chunk (start, length)
    is tokens [start, start + length) of a prompt. `logit_rows` is how many tokens get logits: by default the decoding
    rows and one for each chunk.

    As built, a step runs one node after the other. The passes in `graph_passes.py` change that.
    """

    def __init__(
        self, model_config: ModelShape, parallel_config: ParallelShape | None = None, element_bytes: int = 2
    ) -> None:
        parallel = Parallelism() if parallel_config is None else parallel_config
        stages = parallel.pipeline_parallel_size
        if stages > model_config.num_layers:
            raise ValueError(f"pipeline_parallel_size {stages} is more than {model_config.num_layers} layers")
        self.work = ModelWork(model_config, parallel, element_bytes)
        self._num_layers = model_config.num_layers
        self._tp = parallel.tensor_parallel_size
        self._stages = stages

    def build_prefill_graph(
        self, chunks: Sequence[tuple[int, int]], logit_rows: int | None = None, moves: Sequence[KVMove] = ()
    ) -> ExecutionGraph:
        """A step of prompt chunks only."""
        return self.build_hybrid_graph([], chunks, logit_rows, moves)

    def build_decode_graph(
        self, decode_contexts: Sequence[int], logit_rows: int | None = None, moves: Sequence[KVMove] = ()
    ) -> ExecutionGraph:
        """A step of decoding rows only."""
        return self.build_hybrid_graph(decode_contexts, [], logit_rows, moves)

    def build_hybrid_graph(
        self,
        decode_contexts: Sequence[int],
        chunks: Sequence[tuple[int, int]],
        logit_rows: int | None = None,
        moves: Sequence[KVMove] = (),
    ) -> ExecutionGraph:
        """A step of decoding rows and prompt chunks; an empty graph if there are none."""
        rows = len(decode_contexts) + sum(length for _, length in chunks)
        wanted = len(decode_contexts) + len(chunks) if logit_rows is None else logit_rows
        if not rows:
            return ExecutionGraph()
        return _StepBuilder(self.work, self._num_layers, self._tp, self._stages).build(
            list(decode_contexts), list(chunks), rows, wanted, list(moves)
        )


class _StepBuilder:
    """One step's graph in the making: `_at` are the nodes that the next one reads, `_residual` the newest norm, whose
    sum the next one adds to."""

    def __init__(self, work: ModelWork, num_layers: int, tp: int, stages: int) -> None:
        self._work = work
        self._num_layers = num_layers
        self._tp = tp
        self._stages = stages
        self._stage = 0
        self._graph = ExecutionGraph()
        self._at: list[str] = []
        self._residual: list[str] = []

    def build(
        self,
        contexts: list[int],
        chunks: list[tuple[int, int]],
        rows: int,
        logit_rows: int,
        moves: list[KVMove],
    ) -> ExecutionGraph:
        self._compute(NodeKind.EMBEDDING, None, rows)
        for layer in range(self._num_layers):
            self._enter_stage(layer, rows)
            # After the last layer's attention only the rows that get logits go on.
            left = logit_rows if layer == self._num_layers - 1 else rows
            self._norm(layer, rows, "norm")
            loads = self._move(layer, [move for move in moves if move.kind is NodeKind.KV_LOAD])
            self._compute(NodeKind.QKV_PROJ, layer, rows)
            self._attend(layer, contexts, chunks, loads)
            self._move(layer, [move for move in moves if move.kind is not NodeKind.KV_LOAD])
            self._compute(NodeKind.OUT_PROJ, layer, left)
            self._all_reduce(layer, "attn", left)
            self._norm(layer, left, "mlp_norm")
            self._compute(NodeKind.FFN, layer, left)
            self._all_reduce(layer, "ffn", left)
        self._norm(None, logit_rows, "final_norm")
        self._compute(NodeKind.LM_HEAD, None, logit_rows)
        if self._tp > 1:
            num_bytes = self._work.logit_bytes * logit_rows * (self._tp - 1)
            self._communicate(NodeKind.COMM_ALL_GATHER, "logits", None, num_bytes)
        self._compute(NodeKind.SAMPLE, None, logit_rows)
        return self._graph

    def _add(self, kind: NodeKind, name: str, layer: int | None, inputs: list[str], **work: Any) -> str:
        name = name if layer is None else f"{layer}.{name}"
        self._graph.add(Node(name, kind, layer, self._stage, **work), inputs)
        return name

    def _compute(self, kind: NodeKind, layer: int | None, rows: int, name: str | None = None) -> None:
        if not rows:
            return
        work = self._work.rows[kind]
        node = self._add(
            kind,
            name or str(kind),
            layer,
            self._at,
            rows=rows,
            flops=work.flops * rows,
            num_bytes=work.fixed_bytes + work.row_bytes * rows,
            output_bytes=work.row_output_bytes * rows,
        )
        self._at = [node]

    def _norm(self, layer: int | None, rows: int, name: str) -> None:
        self._at += self._residual
        self._compute(NodeKind.LAYERNORM, layer, rows, name)
        self._residual = list(self._at)

    def _attend(self, layer: int, contexts: list[int], chunks: list[tuple[int, int]], loads: list[str]) -> None:
        inputs, outputs = self._at + loads, []
        if contexts:
            flops, num_bytes = self._work.decode_attention(len(contexts), sum(contexts))
            outputs.append(self._attention(NodeKind.DECODE_ATTN, "", layer, inputs, len(contexts), flops, num_bytes))
        for index, (start, length) in enumerate(chunks):
            flops, num_bytes = self._work.prefill_attention(start, length)
            name = f"_{index}"
            outputs.append(self._attention(NodeKind.PREFILL_ATTN, name, layer, inputs, length, flops, num_bytes))
        self._at = outputs

    def _attention(
        self, kind: NodeKind, suffix: str, layer: int, inputs: list[str], rows: int, flops: float, num_bytes: float
    ) -> str:
        output_bytes = self._work.attention_output_bytes(rows)
        work = {"rows": rows, "flops": flops, "num_bytes": num_bytes, "output_bytes": output_bytes}
        return self._add(kind, f"{kind}{suffix}", layer, inputs, **work)

    def _move(self, layer: int, moves: list[KVMove]) -> list[str]:
        """KV moves of a layer, each by itself: loads are asked for when the layer begins, the others read its KV."""
        names = []
        for index, move in enumerate(moves):
            num_bytes = self._work.kv_bytes_per_layer * move.tokens
            kept = num_bytes if move.kind is NodeKind.KV_LOAD else 0
            name = f"{move.kind}_{index}_{move.link}"
            work = {"rows": move.tokens, "num_bytes": num_bytes, "output_bytes": kept, "link": move.link}
            names.append(self._add(move.kind, name, layer, self._at, **work))
        return names

    def _all_reduce(self, layer: int, name: str, rows: int) -> None:
        if self._tp > 1 and rows:
            # A ring sends every byte 2 (n - 1) / n times (Patarasuk and Yuan, JPDC 2009).
            num_bytes = 2 * (self._tp - 1) / self._tp * self._work.hidden_bytes * rows
            self._communicate(NodeKind.COMM_ALL_REDUCE, f"all_reduce_{name}", layer, num_bytes, rows)

    def _communicate(self, kind: NodeKind, name: str, layer: int | None, num_bytes: float, rows: int = 0) -> None:
        kept = self._work.hidden_bytes * rows
        work = {"rows": rows, "num_bytes": num_bytes, "output_bytes": kept, "link": "interconnect"}
        self._at = [self._add(kind, name, layer, self._at, **work)]

    def _enter_stage(self, layer: int, rows: int) -> None:
        """Between two stages go what the layer before has made, and the residual it is added to."""
        stage = layer * self._stages // self._num_layers
        if stage == self._stage:
            return
        num_bytes = self._work.hidden_bytes * rows
        sent = []
        for name, inputs in (("hidden", self._at), ("residual", self._residual)):
            self._at = inputs
            self._communicate(NodeKind.COMM_SEND, f"send_{name}", layer, num_bytes, rows)
            sent.append(self._at)
        self._stage = stage
        received = [
            self._add(
                NodeKind.COMM_RECV,
                f"recv_{name}",
                layer,
                inputs,
                rows=rows,
                output_bytes=num_bytes,
                link="interconnect",
            )
            for name, inputs in zip(("hidden", "residual"), sent, strict=True)
        ]
        self._at, self._residual = received[:1], received[1:]
