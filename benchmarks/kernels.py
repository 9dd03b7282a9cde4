"""Times of the backend's operations on the shape of qwen2.5-0.5b beside the machine's floor, measured in the same run.

The floor of an operation is the larger of its bytes over the read bandwidth and its operations over the rate of a
large square product. Weights are cycled through more memory than the caches hold, as a forward pass does.
"""

from __future__ import annotations

import itertools
import math
import time
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..backends import StepLayout, detect_backend
from ..config import DType
from .measurement import format_table

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from ..backends import Backend, Linear
    from ..config import BackendConfig

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS, BLOCK = 896, 4864, 14, 2, 64, 151936, 24, 16
WEIGHTS = {
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "output": (HIDDEN, HEADS * HEAD_DIM),
    "gate_up, silu": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
    "lm_head": (VOCAB, HIDDEN),
}
STEPS = {  # (context, query length) of each sequence
    "decode 1 x 512": [(512, 1)],
    "decode 16 x 512": [(512, 1)] * 16,
    "decode 16 x 64..1024": [(64 * index, 1) for index in range(1, 17)],
    "prompt 512": [(512, 512)],
    "chunk 512 after 1536": [(2048, 512)],
    "4 chunks 32 after 1024": [(1056, 32)] * 4,
}
COLD_BYTES = 96 << 20


class Bench:
    """Measures one backend and collects the lines of the table; `seconds` is how long each operation is repeated."""

    def __init__(self, backend: Backend, seconds: float) -> None:
        self.backend = backend
        self.seconds = seconds
        self.dtype = backend.compute_dtype(DType.AUTO, torch.bfloat16)
        self.lines: list[list[str]] = []
        data = self.tensor(64 << 20).float()
        target = torch.empty_like(data)
        self.read_rate = data.nbytes / self.time(data.sum)
        self.copy_rate = 2 * data.nbytes / self.time(partial(target.copy_, data))
        square = self.tensor(2048, 2048)
        self.product_rate = 2 * 2048**3 / self.time(partial(torch.mm, square, square))

    def tensor(self, *shape: int) -> torch.Tensor:
        """Normal values on the device in the compute dtype."""
        return torch.randn(shape).to(self.backend.device, self.dtype)

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of the fastest of many calls: what the code costs when nothing else runs."""
        call()
        self.backend.synchronize()
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < 5 or time.perf_counter() - begun < self.seconds:
            start = time.perf_counter()
            call()
            self.backend.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    def add(self, name: str, rows: int, seconds: float, num_bytes: float, operations: float) -> None:
        """One line of the table; no bytes and no operations: work that has no floor."""
        floor = max(num_bytes / self.read_rate, operations / self.product_rate)
        columns = [f"{floor * 1e3:.3f}", f"{floor / seconds:.0%}"] if floor else ["", ""]
        self.lines.append([name, str(rows), f"{seconds * 1e3:.3f}", *columns])

    def report(self) -> str:
        """The table, and the rates that its floors come from."""
        return "\n".join(
            (
                f"{self.backend.name}, {self.dtype}",
                format_table(["operation", "rows", "ms", "floor ms", "of the floor"], self.lines),
                f"read {self.read_rate / 1e9:.1f} GB/s, copy {self.copy_rate / 1e9:.1f} GB/s (read + write), "
                f"product {self.product_rate / 1e9:.0f} GFLOP/s, torch {torch.__version__}, "
                f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
            )
        )

    def linear(self) -> None:
        """Every product of a layer, and the head, with bfloat16 weights."""

        def call_next(turn: Iterator[Linear], x: torch.Tensor) -> torch.Tensor:
            return next(turn)(x)

        for name, (width, depth) in WEIGHTS.items():
            num_bytes = 2 * width * depth
            copies = math.ceil(COLD_BYTES / num_bytes)
            pack = self.backend.gated_linear if name == "gate_up, silu" else self.backend.linear
            packed = [
                pack(torch.randn(width, depth).mul_(0.02).bfloat16(), None, self.dtype) for _ in range(copies)
            ]
            self.backend.synchronize()
            for rows in (1, 4, 16, 256) if width < VOCAB else (1, 4, 16):
                seconds = self.time(partial(call_next, itertools.cycle(packed), self.tensor(rows, depth)))
                self.add(name, rows, seconds, num_bytes, 2 * rows * width * depth)

    def attention(self) -> None:
        """One layer's attention, K and V of the step written to the pool; and its plan, made once for all layers."""
        num_blocks = 16 * 1024 // BLOCK
        kv = self.backend.allocate_kv((num_blocks, LAYERS, 2, KV_HEADS, BLOCK, HEAD_DIM), self.dtype).normal_()
        for name, sequences in STEPS.items():
            layout = lay_out(sequences, num_blocks)
            tokens = len(layout.positions)
            q, k, v = (self.tensor(tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
            plan = self.backend.plan_attention(layout, kv, HEADS)

            def attend_next(
                turn: Iterator[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: object
            ) -> torch.Tensor:
                return self.backend.attend(q, k, v, kv, next(turn), plan, HEAD_DIM**-0.5)

            seconds = self.time(partial(attend_next, itertools.cycle(range(LAYERS)), q, k, v, plan))
            read = sum(context for context, _ in sequences) * 2 * KV_HEADS * HEAD_DIM * kv.element_size()
            seen = sum(length * (context - (length - 1) / 2) for context, length in sequences)
            self.add(name, tokens, seconds, read, 4 * HEADS * HEAD_DIM * seen)
            self.add("  its plan", tokens, self.time(partial(self.backend.plan_attention, layout, kv, HEADS)), 0, 0)

    def elementwise(self) -> None:
        """What lies between the products."""
        backend, size = self.backend, torch.empty(0, dtype=self.dtype).element_size()
        for rows in (1, 16, 512):
            x, residual, weight = self.tensor(rows, HIDDEN), self.tensor(rows, HIDDEN), self.tensor(HIDDEN)
            heads, table = self.tensor(rows, HEADS + KV_HEADS, HEAD_DIM), self.tensor(rows, 1, HEAD_DIM)
            for name, call, elements in (
                ("add_rms_norm", partial(backend.add_rms_norm, x, residual, weight, 1e-6), 4 * x.numel()),
                ("apply_rope", partial(backend.apply_rope, heads, table, table), 2 * heads.numel()),
            ):
                self.add(name, rows, self.time(call), elements * size, 0)


OPERATIONS = {"linear": Bench.linear, "attention": Bench.attention, "elementwise": Bench.elementwise}


def lay_out(sequences: list[tuple[int, int]], num_blocks: int) -> StepLayout:
    """A step of (context, query length) sequences on scattered blocks; those of one token come first."""
    ids = iter(torch.randperm(num_blocks).tolist())
    width = max(-(-context // BLOCK) for context, _ in sequences)
    tables = torch.zeros(len(sequences), width, dtype=torch.int64)
    slots = []
    for row, (context, length) in enumerate(sequences):
        count = -(-context // BLOCK)
        tables[row, :count] = torch.tensor(list(itertools.islice(ids, count)))
        place = torch.arange(context - length, context)
        slots.append(tables[row, place // BLOCK] * BLOCK + place % BLOCK)
    return StepLayout(
        positions=torch.cat([torch.arange(context - length, context) for context, length in sequences]),
        slots=torch.cat(slots),
        block_tables=tables,
        context_lens=torch.tensor([context for context, _ in sequences]),
        query_lens=[length for _, length in sequences],
        num_decodes=sum(length == 1 for _, length in sequences),
    )


@torch.inference_mode()
def measure_kernels(config: BackendConfig, operations: Collection[str], seconds: float) -> str:
    """Time those of OPERATIONS on the configured device; returns what to print.

    Raises:
        ConfigError: there is no such device.
    """
    bench = Bench(detect_backend(config), seconds)
    for name, measure in OPERATIONS.items():
        if name in operations:
            measure(bench)
    return bench.report()
