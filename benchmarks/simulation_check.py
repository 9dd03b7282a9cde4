"""`sagellm bench simulation`: the same requests through the real engine and through the simulator.

On device `local` the engine runs the model. On a preset its threads, flow, scheduler and KV books are real and only the
device is not: it answers when the preset's would have. What then differs is the simulator's own error.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import numpy as np

from ..config import SageLLMConfig
from ..errors import FlowError
from ..records import Completion, Request, SamplingParams
from ..runtime.simulation.engine import Stages
from ..runtime.simulation.executor import SimulatedExecutor
from ..runtime.simulation.simulation import simulate
from .simulated_device import make_target
from .traces import TraceReplay, TraceRequest
from .workloads import SHAPES

if TYPE_CHECKING:
    from ..runtime.scheduler.plan import StepResult
    from ..runtime.services import EngineServices
    from ..runtime.simulation.engine import Target

_TOKEN = 7  # what a device that is not there says


@dataclass(frozen=True, slots=True)
class ServingFigures:
    """Times of every request in milliseconds, and output tokens a second from the first arrival to the last end."""

    ttft_ms: list[float]
    tpot_ms: list[float]
    tokens_per_second: float

    def rows(self) -> dict[str, float]:
        """Means and percentiles by name."""
        found = {}
        for name, values in (("TTFT", self.ttft_ms), ("TPOT", self.tpot_ms)):
            found[f"{name} mean ms"] = float(np.mean(values))
            for percent in (50, 99):
                found[f"{name} p{percent} ms"] = float(np.percentile(values, percent))
        return {**found, "output tokens/s": self.tokens_per_second}


def check_simulation(shape: str, device: str, requests: int, rate: float, threads: int) -> list[list[str]]:
    """Rows of figure, measured, predicted and error, for requests of 64 to 512 tokens in and 16 to 64 out, `rate` of
    them a second.

    Raises:
        ConfigError: there is no such device.
        FlowError: a request failed.
    """
    trace = TraceReplay(_poisson(requests, rate, SHAPES[shape]["vocab_size"]))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        config = SageLLMConfig.model_validate(
            {
                "model": {"model_id": folder, "load_format": "dummy"},
                "scheduler": {"request_timeout_s": 0, "queue_timeout_s": 0},
                "backend": {"threads": threads},
            }
        )
        target = make_target(config, device)
        measured = anyio.run(_measure, config, target, trace).rows()
    predicted = _predict(config, target, trace).rows()
    return [
        [name, f"{real:.1f}", f"{predicted[name]:.1f}", f"{predicted[name] / real - 1:+.1%}"]
        for name, real in measured.items()
    ]


def _poisson(count: int, rate: float, vocab_size: int) -> list[TraceRequest]:
    rng, now, requests = random.Random(0), 0.0, []
    for _ in range(count):
        tokens = np.array([rng.randrange(vocab_size) for _ in range(rng.randint(64, 512))], np.int32)
        requests.append(TraceRequest(now, len(tokens), rng.randint(16, 64), tokens))
        now += rng.expovariate(rate)
    return requests


def _predict(config: SageLLMConfig, target: Target, trace: TraceReplay) -> ServingFigures:
    result = simulate(trace.arrivals(), config, Stages(), target, trace.output_token)
    return ServingFigures(
        [each.ttft_s * 1000 for each in result.outcomes if each.ttft_s is not None],
        [each.tpot_s * 1000 for each in result.outcomes if each.tpot_s is not None],
        sum(each.output_tokens for each in result.outcomes) / result.elapsed_s,
    )


async def _measure(config: SageLLMConfig, target: Target, trace: TraceReplay) -> ServingFigures:
    """Serve the requests for real, each at its time."""
    from .. import operators  # noqa: F401 - registers the built-in stages
    from ..engine import standard_pipeline
    from ..graph import build_pipeline
    from ..runtime.assembly import assemble
    from ..runtime.services import EngineServices

    pipeline = build_pipeline(standard_pipeline(config), base_dir=Path.cwd())
    services = EngineServices(pipeline.engine)
    if target.device not in ("cpu", "cuda"):
        services.model, services.backend_name = target.model, target.device
        services.executors = [_PacedExecutor(target, config.scheduler.num_slots)]
    services.load()
    flow = assemble(pipeline, services)
    async with services.running(), anyio.create_task_group() as tasks:
        tasks.start_soon(flow.run)
        await _serve(services, trace, 1)  # whatever is only slow the first time
        figures = await _serve(services, trace)
        services.calls.close("all requests have been served")
    return figures


async def _serve(services: EngineServices, trace: TraceReplay, limit: int | None = None) -> ServingFigures:
    from ..runtime.calls import FutureCaller

    services.kv.clear()
    begin, callers = time.monotonic(), []
    for at_s, sequence in list(trace.arrivals())[:limit]:
        await anyio.sleep(max(0.0, begin + at_s - time.monotonic()))
        request = Request(
            sequence.request_id,
            prompt_tokens=sequence.prompt_tokens.tolist(),
            sampling=SamplingParams(max_new_tokens=sequence.sampling.max_new_tokens, temperature=0.0, ignore_eos=True),
            interactive=True,
        )
        request.caller = FutureCaller(request)
        callers.append(request.caller)
        services.calls.submit([request])
    done = [await anyio.to_thread.run_sync(caller.future.result) for caller in callers]
    seconds = time.monotonic() - begin
    completions = [record for record in done if isinstance(record, Completion)]
    if len(completions) < len(done):
        raise FlowError(f"{len(done) - len(completions)} of {len(done)} requests failed")
    return ServingFigures(
        [completion.metrics.ttft_ms for completion in completions],
        [completion.metrics.tpot_ms for completion in completions],
        sum(completion.output_length for completion in completions) / seconds,
    )


class _RealTime:
    @property
    def now(self) -> float:
        return time.monotonic()


class _PacedExecutor(SimulatedExecutor):
    """A simulated device that real threads wait for."""

    def __init__(self, target: Target, num_slots: int) -> None:
        layers = target.model.architecture.num_layers
        super().__init__(num_slots, layers, target.times, _RealTime(), lambda sequence: _TOKEN)

    def finish(self) -> StepResult:
        time.sleep(max(0.0, self.oldest_end - time.monotonic()))
        return super().finish()
