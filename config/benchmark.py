"""The section `benchmark`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from .base import Config
from .problems import Contradiction, not_available

if TYPE_CHECKING:
    from collections.abc import Iterator


class BenchmarkConfig(Config):
    """What is measured. Gates turn a run into a failure: throughput in output tokens/s, latencies in ms (mean)."""

    enable_profiling: bool = False
    enable_metrics: bool = True
    enable_gates: bool = False
    min_throughput_tps: Annotated[float, Field(ge=0)] | None = None
    max_ttft_ms: Annotated[float, Field(ge=0)] | None = None
    max_tpot_ms: Annotated[float, Field(ge=0)] | None = None

    def contradictions(self) -> Iterator[Contradiction]:
        if self.enable_profiling:
            yield not_available("enable_profiling", "benchmark.enable_profiling", "leave it false")
        gates = ("min_throughput_tps", "max_ttft_ms", "max_tpot_ms")
        given = [*self.changed(*gates)]
        if self.enable_gates and not given:
            text = f"enable_gates is true, but there is no gate: write one of {', '.join(gates)}, or leave it out"
            yield Contradiction(text, ("enable_gates",))
        for name in given if not self.enable_gates else ():
            text = f"{name} is a gate, but enable_gates is false: write enable_gates: true, or leave {name} out"
            yield Contradiction(text, (name, "enable_gates"))
        if self.enable_gates and not self.enable_metrics:
            text = "enable_gates compares figures, but enable_metrics is false: leave one of them out"
            yield Contradiction(text, ("enable_gates", "enable_metrics"))
