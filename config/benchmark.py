"""The section `benchmark`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from .base import Config, refuse


class BenchmarkConfig(Config):
    """What is measured. Gates turn a run into a failure: throughput in output tokens/s, latencies in ms (mean)."""

    enable_profiling: bool = False
    enable_metrics: bool = True
    enable_gates: bool = False
    min_throughput_tps: Annotated[float, Field(ge=0)] | None = None
    max_ttft_ms: Annotated[float, Field(ge=0)] | None = None
    max_tpot_ms: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _available(self) -> BenchmarkConfig:
        refuse(self.enable_profiling, "benchmark.enable_profiling", "leave it false")
        gates = (self.min_throughput_tps, self.max_ttft_ms, self.max_tpot_ms)
        if not self.enable_gates and any(gate is not None for gate in gates):
            raise ValueError("a gate is set but enable_gates is false: set enable_gates: true, or leave the gate out")
        if self.enable_gates and not self.enable_metrics:
            raise ValueError("enable_gates needs enable_metrics: true")
        return self
