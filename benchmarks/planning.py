"""What deciding costs: the median time of a step's plan and of a grant round, on a worker whose model costs nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ..accel.device_rates import DeviceRates
from ..accel.step_cost import StepCost
from ..config import SageLLMConfig
from ..models.architecture import parse_architecture
from ..records import Request, SamplingParams, Sequence
from ..runtime.scheduler.lease import PrefixHint
from ..runtime.services import EngineServices
from .workloads import SHAPES

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT_TOKENS, OUTPUT_TOKENS = (32, 512), (16, 256)


@dataclass(slots=True)
class PlanningTimes:
    """Seconds of each step's plan, and of the grant round before it."""

    plan: list[float] = field(default_factory=list)
    grant: list[float] = field(default_factory=list)

    @property
    def both(self) -> list[float]:
        return [plan + grant for plan, grant in zip(self.plan, self.grant, strict=True)]

    def row(self) -> list[str]:
        """Medians of plan, grant and both, and the 99th percentile of both, in microseconds."""
        figures = [median(self.plan), median(self.grant), median(self.both), float(np.quantile(self.both, 0.99))]
        return [f"{1e6 * figure:.0f}" for figure in figures]


def measure_planning(
    running: int, waiting: int, steps: int, policy: str, mode: str, slo_ms: float | None
) -> PlanningTimes:
    """Keep `running` rows and `waiting` sequences that wait, for `steps` steps: whoever ends is replaced.

    Prompts are random, of 32 to 512 tokens, outputs of 16 to 256. `slo_ms` is judged by a made-up device on which a
    step of all rows takes some 10 ms.
    """
    scheduler: dict[str, Any] = {"max_batch_size": running, "max_decode_batch": running, "policy": policy, "mode": mode}
    scheduler |= {"max_step_tokens": 2048, "launch_ahead": False, "tpot_slo_ms": slo_ms}
    config = SageLLMConfig.model_validate(
        {"model": {"model_id": "builtin:null"}, "kv_cache": {"max_tokens": 1024 * running}, "scheduler": scheduler}
    )
    services = EngineServices(config)
    shape = parse_architecture(SHAPES["qwen2.5-0.5b"])
    services.step_cost = StepCost(shape, DeviceRates.from_specification(1e14, 2e11, launch_s=2e-6))
    return _Rush(services, waiting).run(steps)


class _Rush:
    """More sequences than there is room for, and the flow's part played by hand."""

    def __init__(self, services: EngineServices, waiting: int) -> None:
        self._services = services
        self._waiting = waiting
        self._rng = np.random.default_rng(0)
        worker: Any = services.worker
        worker.on_prefilled = worker.submit_decode
        worker.on_decoded = lambda records: None
        self._worker = worker
        self._times = PlanningTimes()
        worker.planner.plan = self._timed(worker.planner.plan, self._times.plan)
        self._take_granted = self._timed(services.waiting.take_granted, self._times.grant)

    @staticmethod
    def _timed(call: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                times.append(time.perf_counter() - began)

        return run

    def run(self, steps: int) -> PlanningTimes:
        queue = self._services.waiting
        warm = 2 * OUTPUT_TOKENS[1]
        for step in range(warm + steps):
            while len(queue) < self._waiting:
                queue.offer(self._sequence())
            if step == warm:
                self._times.plan.clear()
                self._times.grant.clear()
            granted = self._take_granted()
            if granted:
                self._worker.submit_prefill(granted)
            self._worker.step()
        return self._times

    def _sequence(self) -> Sequence:
        rng = self._rng
        prompt = rng.integers(0, 50_000, rng.integers(*PROMPT_TOKENS)).astype(np.int32)
        sampling = SamplingParams(max_new_tokens=int(rng.integers(*OUTPUT_TOKENS))).with_defaults(temperature=0.0)
        request = Request("r", tenant=f"t{rng.integers(8)}", priority=int(rng.integers(3)))
        request.deadline_ms = float(rng.integers(10**6))
        sequence = Sequence(request, prompt, sampling)
        sequence.kv = PrefixHint(0)
        return sequence
