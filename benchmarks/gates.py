"""Gates: figures that a run must reach, or it counts as failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import GateError

if TYPE_CHECKING:
    from ..config import BenchmarkConfig
    from ..operators.metrics import MetricsSummary


def check_gates(config: BenchmarkConfig, summary: MetricsSummary) -> None:
    """Compare a run's means with the configured limits; nothing happens unless `enable_gates`.

    Raises:
        GateError: a limit was missed; the message names each.
    """
    if not config.enable_gates:
        return
    missed = []
    if config.min_throughput_tps is not None and summary.output_tokens_per_s < config.min_throughput_tps:
        missed.append(f"throughput {summary.output_tokens_per_s:.1f} tokens/s is below {config.min_throughput_tps:g}")
    if config.max_ttft_ms is not None and summary.ttft_ms.mean > config.max_ttft_ms:
        missed.append(f"mean TTFT {summary.ttft_ms.mean:.1f} ms is above {config.max_ttft_ms:g}")
    if config.max_tpot_ms is not None and summary.tpot_ms.mean > config.max_tpot_ms:
        missed.append(f"mean TPOT {summary.tpot_ms.mean:.1f} ms is above {config.max_tpot_ms:g}")
    if missed:
        raise GateError("; ".join(missed))
