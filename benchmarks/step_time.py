"""How well a step's time is predicted: random steps on the real executor beside what the execution graph estimates."""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from ..accel.step_cost import StepCost
from ..backends import detect_backend
from ..models.architecture import parse_architecture
from ..models.resolve import GenerationDefaults, ResolvedModel
from ..models.weights import load_model
from ..runtime.worker.calibration import kv_element_bytes, load_rates, measure_rates
from ..runtime.worker.synthetic_steps import StepShape, SyntheticSteps
from ..runtime.worker.torch_executor import TorchExecutor
from .measurement import format_table
from .workloads import SHAPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..backends import Backend
    from ..config import BackendConfig

BLOCK_SIZE = 16
POOL_TOKENS = 65536
SLOTS = 256
KINDS = ("decode", "prefill", "hybrid")


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One shape: the median of several runs, and the estimate; seconds."""

    kind: str
    shape: StepShape
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return abs(self.predicted / self.measured - 1)


def random_shape(kind: str, rng: random.Random, max_rows: int, max_chunk: int, max_context: int) -> StepShape:
    """A step of that kind; sizes are spread evenly over their orders of magnitude."""

    def spread(low: int, high: int) -> int:
        return round(low * math.exp(rng.random() * math.log(high / low)))

    contexts: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    if kind != "prefill":
        longest = spread(64, max_context)
        contexts = tuple(spread(16, longest) for _ in range(spread(1, max_rows)))
    if kind != "decode":
        left = spread(16, max_chunk)
        for _ in range(rng.choice((1, 1, 2, 3))):
            length = rng.randint(1, left)
            chunks += ((rng.choice((0, spread(16, max_context))), length),)
            left -= length
            if not left:
                break
    return StepShape(contexts, chunks, rng.randint(0, len(chunks)))


def time_steps(
    config: BackendConfig, shape: str, batches: int, rounds: int, seed: int, fresh: bool, say: Callable[[str], None]
) -> list[TimedStep]:
    """Time `batches` random steps of each kind, `rounds` times in turn, on a model of one of SHAPES.

    The rates are those kept for this device; `fresh` measures them now.

    Raises:
        ConfigError: there is no such device.
    """
    backend = detect_backend(config)
    model = ResolvedModel(shape, None, parse_architecture(SHAPES[shape]), GenerationDefaults(), "dummy", "")
    began = time.perf_counter()
    rates = measure_rates(model, backend) if fresh else load_rates(model, backend)
    say(f"rates of {backend.name} after {time.perf_counter() - began:.1f} s")
    cost = StepCost(model.architecture, rates, kv_element_bytes(model, backend))
    loaded = load_model(model, backend)
    blocks = POOL_TOKENS // BLOCK_SIZE
    executor = TorchExecutor(loaded, backend, blocks, BLOCK_SIZE, SLOTS)
    try:
        steps = SyntheticSteps(executor, blocks, BLOCK_SIZE, SLOTS, loaded.vocab_size)
        chosen = _choose(steps, batches, random.Random(seed), backend, loaded.max_seq_len)
        times: dict[int, list[float]] = defaultdict(list)
        for turn in range(rounds):
            for index, (_, step) in enumerate(chosen):
                plan = steps.plan(step)
                began = time.perf_counter()
                executor.launch(plan).result()
                times[index].append(time.perf_counter() - began)
            say(f"round {turn + 1} of {rounds}")
    finally:
        executor.close()
    return [TimedStep(kind, step, median(times[i]), predict(cost, step)) for i, (kind, step) in enumerate(chosen)]


def predict(cost: StepCost, shape: StepShape) -> float:
    """The estimate for a shape, in seconds."""
    starts, lengths = [start for start, _ in shape.chunks], [length for _, length in shape.chunks]
    return cost.step_seconds(shape.decode_contexts, starts, lengths, shape.logit_rows)


def _choose(
    steps: SyntheticSteps, batches: int, rng: random.Random, backend: Backend, max_seq_len: int
) -> list[tuple[str, StepShape]]:
    """Fewer rows and shorter chunks on a CPU: as a server would run there."""
    max_rows, max_chunk = (64, 512) if backend.name == "cpu" else (SLOTS, 4096)
    chosen: list[tuple[str, StepShape]] = []
    for kind in KINDS:
        count = 0
        while count < batches:
            step = random_shape(kind, rng, max_rows, min(max_chunk, max_seq_len // 2), min(8192, max_seq_len // 2))
            if steps.fits(step):
                chosen.append((kind, step))
                count += 1
    return chosen


def format_errors(steps: list[TimedStep], each: bool) -> str:
    """Errors by kind of step; with `each` also every step."""
    lines = []
    if each:
        rows = [
            [step.kind, *_describe(step.shape), f"{step.measured * 1e3:.1f}", f"{step.predicted * 1e3:.1f}",
             f"{step.predicted / step.measured - 1:+.0%}"]
            for step in steps
        ]  # fmt: skip
        header = ["step", "rows", "context", "chunks", "measured ms", "predicted ms", "error"]
        lines.append(format_table(header, rows))
    groups = {kind: [step for step in steps if step.kind == kind] for kind in KINDS} | {"all": steps}
    table = []
    for kind, found in groups.items():
        errors = np.array([step.error for step in found])
        bias = np.median([step.predicted / step.measured for step in found]) - 1
        table.append(
            [kind, f"{len(found)}", f"{np.median(errors):.1%}", f"{np.quantile(errors, 0.9):.1%}", f"{bias:+.1%}"]
        )
    lines.append(format_table(["steps", "count", "median error", "p90 error", "median bias"], table))
    return "\n\n".join(lines)


def _describe(shape: StepShape) -> tuple[str, str, str]:
    contexts = shape.decode_contexts
    chunks = " ".join(f"{start}+{length}" for start, length in shape.chunks)
    return f"{len(contexts)}", f"{sum(contexts) / max(len(contexts), 1):.0f}", chunks
