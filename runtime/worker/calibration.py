"""How fast this device runs a model: steps of a shortened copy with random weights, timed part by part.

The parts are timed inside real steps of the real executor, where caches, threads and memory are as they will be. A
layer costs what another does, so few of them tell about all.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from math import prod
from statistics import fmean, median
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...accel.execution_graph import NodeKind
from ...accel.model_work import ModelWork
from ...accel.rate_fitting import Observation, fit_rates
from ...accel.rates_file import RatesFile
from ...models.resolve import GenerationDefaults, ResolvedModel
from ...models.weights import load_model
from .link_calibration import measure_links
from .step_probe import STEP, StepProbe
from .synthetic_steps import StepShape, SyntheticSteps
from .torch_executor import TorchExecutor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ...accel.device_rates import DeviceRates
    from ...backends.base import Backend
    from ...models.architecture import DecoderConfig

log = logging.getLogger("sageLLM")

LAYERS = 4
BLOCK_SIZE = 16
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CONTEXTS = ((1, 4096), (4, 2048), (16, 1024), (64, 384), (256, 96))  # (decoding rows, tokens that each attends to)
LENGTHS = (16, 64, 128, 256, 512, 1024, 2048, 4096)  # of chunks, from the start and from START on
START = 2048
BUDGET_S = 40.0
PASSES = 7


def load_rates(model: ResolvedModel, backend: Backend, nvme_folder: Path | None = None) -> DeviceRates:
    """The rates of `backend` for `model`, as measured before or, where they never were, measured now.

    That takes up to a minute and wants the device for itself. `nvme_folder` is where KV would be kept on disk.
    """
    file = RatesFile(rates_key(model, backend, nvme_folder))
    rates = file.read()
    if rates is None:
        log.warning("measuring how fast %s runs %s: once, up to a minute", backend.name, model.model_id)
        rates = measure_rates(model, backend, nvme_folder)
        file.write(rates)
        log.info("measured; the rates are kept in %s", file.path)
    return rates


def rates_key(model: ResolvedModel, backend: Backend, nvme_folder: Path | None) -> dict[str, object]:
    """Whatever changes the rates, as plain values."""
    try:
        release = version("sagellm")
    except PackageNotFoundError:
        release = ""
    architecture = asdict(model.architecture)
    shape = {name: architecture[name] for name in _shape_fields()}
    return {
        "device": _device_name(backend),
        "kernels": f"{type(backend).__name__} {getattr(backend, 'capability', '')}",
        "threads": torch.get_num_threads(),
        "dtype": str(_dtype(model, backend)),
        "torch": torch.__version__,
        "sagellm": release,
        "model": shape,
        "nvme": None if nvme_folder is None else str(nvme_folder),
    }


def _shape_fields() -> tuple[str, ...]:
    return ("num_heads", "num_kv_heads", "head_dim", "hidden_size", "intermediate_size", "vocab_size", "qkv_bias",
            "output_bias", "mlp_bias", "qk_norm")  # fmt: skip


def _device_name(backend: Backend) -> str:
    if backend.device.type == "cuda":
        return torch.cuda.get_device_name(backend.device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.split(":", 1)[1].strip() for line in file if line.startswith(("model name", "model\t"))]
        return " ".join(dict.fromkeys(lines))
    except OSError:  # not Linux
        import platform

        return platform.processor() or platform.machine()


def _dtype(model: ResolvedModel, backend: Backend) -> torch.dtype:
    return backend.compute_dtype(model.dtype, getattr(torch, model.architecture.dtype or "float32"))


def kv_element_bytes(model: ResolvedModel, backend: Backend) -> int:
    """Size of an element of KV."""
    return _dtype(model, backend).itemsize


def measure_rates(
    model: ResolvedModel, backend: Backend, nvme_folder: Path | None = None, budget_s: float = BUDGET_S
) -> DeviceRates:
    """Measure the rates now, for about `budget_s` seconds at most."""
    architecture = replace(model.architecture, num_layers=min(LAYERS, model.architecture.num_layers))
    short = ResolvedModel(model.model_id, None, architecture, GenerationDefaults(), "dummy", "", model.dtype)
    loaded = load_model(short, backend)
    block_bytes = prod(loaded.kv_shape(1, BLOCK_SIZE)) * loaded.kv_dtype.itemsize
    blocks = max(64, min(32768 // BLOCK_SIZE, backend.memory_bytes()[0] // 8 // block_bytes))
    executor = TorchExecutor(loaded, backend, blocks, BLOCK_SIZE, max(ROWS))
    try:
        probe = StepProbe(loaded)
        steps = SyntheticSteps(executor, blocks, BLOCK_SIZE, max(ROWS), loaded.vocab_size)
        work = ModelWork(architecture, None, loaded.kv_dtype.itemsize)
        watch = _Watch(executor, probe, steps, work, runs_behind(backend))
        shapes = [shape for shape in step_shapes(architecture) if steps.fits(shape)]
        watch.run(shapes, budget_s)
    finally:
        executor.close()
    return fit_rates(*watch.tell(), measure_links(backend, nvme_folder))


def runs_behind(backend: Backend) -> bool:
    """Whether the device computes while the host goes on."""
    return backend.device.type != "cpu"


def step_shapes(architecture: DecoderConfig) -> Iterator[StepShape]:
    """What is timed, from small to large within each group."""
    limit = architecture.max_seq_len
    for rows in ROWS:
        yield StepShape((min(32, limit),) * rows)
    for rows, context in CONTEXTS:
        yield StepShape((min(context, limit),) * rows)
    for length in LENGTHS:
        for start in (0, min(START, limit - length)):
            if start + length <= limit and start >= 0:
                yield StepShape((), ((start, length),))


class _Run(NamedTuple):
    """One step: its seconds, those of them that belong to no part, and those of one part of each kind and rows."""

    seconds: float
    overhead: float
    parts: dict[tuple[NodeKind | str, int], float]


class _Watch:
    """Runs steps and tells what the parts of each took in the mean, without its slowest run.

    A long step meets every disturbance in proportion; so does a mean, which a median or a minimum of short steps does
    not."""

    def __init__(
        self, executor: TorchExecutor, probe: StepProbe, steps: SyntheticSteps, work: ModelWork, runs_behind: bool
    ) -> None:
        self._runs_behind = runs_behind
        self._executor = executor
        self._probe = probe
        self._steps = steps
        self._work = work
        self._runs: dict[StepShape, list[_Run]] = defaultdict(list)

    def run(self, shapes: list[StepShape], budget_s: float) -> None:
        """Time every shape, several times over. Those that follow a step of more than a 50th of the budget in their
        group are left out: larger ones go at the rate of the largest."""
        began = time.perf_counter()
        self._time(shapes[0])  # whatever is done once
        for turn in range(PASSES):
            too_long: set[bool] = set()
            for shape in shapes:
                group = bool(shape.chunks)
                if group not in too_long and self._observe(shape) > budget_s / 50:
                    too_long.add(group)
            if (time.perf_counter() - began) * (turn + 2) / (turn + 1) > budget_s:
                break

    def _time(self, shape: StepShape) -> float:
        plan = self._steps.plan(shape)
        self._probe.reset()
        began = time.perf_counter()
        self._executor.launch(plan).result()
        self._probe.synchronize()
        self._probe.mark(NodeKind.SAMPLE, shape.logit_rows)
        return time.perf_counter() - began

    def _observe(self, shape: StepShape) -> float:
        probe = self._probe
        seconds = self._time(shape)
        told, counts, scale = probe.seconds.copy(), probe.counts.copy(), 1.0
        if self._runs_behind:
            # Waiting for each part took time of its own: keep the parts' shares, and the whole step's time without.
            probe.stopped = True
            seconds = self._time(shape)
            probe.stopped = False
            scale = seconds / sum(told.values())
        told = {part: scale * spent for part, spent in told.items()}
        overhead = told.pop((STEP, 0), 0.0) + told.pop((NodeKind.SAMPLE, 0), 0.0)
        parts = {part: spent / counts[part] for part, spent in told.items()}
        self._runs[shape].append(_Run(seconds, overhead, parts))
        return seconds

    def tell(self) -> tuple[list[Observation], float]:
        """Every part of every shape, and the seconds of a step beside its parts."""
        found, overheads = [], []
        for shape, runs in self._runs.items():
            kept = sorted(runs, key=lambda run: run.seconds)[: max(1, len(runs) - 1)]
            overheads.append(fmean(run.overhead for run in kept))
            for kind, rows in kept[0].parts:
                if rows:
                    assert isinstance(kind, NodeKind)
                    seconds = fmean(run.parts[kind, rows] for run in kept)
                    found.append(Observation(kind, rows, *self._work_of(kind, rows, shape), seconds))
        return found, median(overheads)

    def _work_of(self, kind: NodeKind, rows: int, shape: StepShape) -> tuple[float, float]:
        if kind is NodeKind.DECODE_ATTN:
            return self._work.decode_attention(rows, float(sum(shape.decode_contexts)))
        if kind is NodeKind.PREFILL_ATTN:
            return self._work.prefill_attention(*shape.chunks[0])
        work = self._work.rows[kind]
        return work.flops * rows, work.fixed_bytes + work.row_bytes * rows
