"""What a run delivered and how fast: counters and distributions over the records that pass."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ..histogram import Histogram
from ..records import Completion, DeadLetter, TokenDelta
from ..runtime.flow.operator import Operator, OperatorConfig, Port, RecordKind, operator

if TYPE_CHECKING:
    from ..kv_runtime.block_times import BlockTimes
    from ..kv_runtime.tiers import TierStats
    from ..runtime.flow.operator import OperatorContext, Outlet

# the bucket bounds of vLLM's metrics of the same names
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_REQUEST_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

_HISTOGRAMS = {
    "time_to_first_token_seconds": (_TTFT_S, "From the request's arrival to its first token."),
    "inter_token_latency_seconds": (_TOKEN_S, "Between tokens of streaming requests; k tokens at once count k times."),
    "request_time_per_output_token_seconds": (_TOKEN_S, "Mean over a request's tokens after the first."),
    "e2e_request_latency_seconds": (_REQUEST_S, "From the request's arrival to its last token."),
    "request_queue_time_seconds": (_REQUEST_S, "From the request's arrival until it was scheduled."),
    "request_prompt_tokens": (_TOKENS, "Prompt tokens per request."),
    "request_generation_tokens": (_TOKENS, "Output tokens per request, all choices; embeddings have none."),
}
_BLOCK_HISTOGRAMS = {
    "lifetime": "From the storing of a KV block until it was evicted; of one run of blocks in eight, as all of these.",
    "idle_before_evict": "From the last use of a KV block until it was evicted.",
    "reuse_gap": "Between uses of a cached KV block.",
}
_COUNTERS = {
    "prompt_tokens_total": "Prompt tokens.",
    "generation_tokens_total": "Output tokens.",
    "prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits_total": "Prompt tokens found there.",
}
_STREAMS_WATCHED = 4096


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of one distribution, in milliseconds, within 1 %; all 0 if nothing was measured."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class MetricsSummary:
    """A run in numbers. Rates are per second from the first request's arrival to the last result."""

    requests: int  # with a completion
    failed: int  # dead letters that passed
    finish_reasons: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    prefix_hit_tokens: int
    elapsed_s: float
    requests_per_s: float
    output_tokens_per_s: float
    queue_ms: Percentiles
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    itl_ms: Percentiles  # only streaming requests show it
    e2e_ms: Percentiles

    @property
    def prefix_hit_ratio(self) -> float:
        return self.prefix_hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Figures:
    """What was counted in a run."""

    def __init__(self) -> None:
        self._histograms = {name: Histogram(bounds) for name, (bounds, _) in _HISTOGRAMS.items()}
        self._counters = dict.fromkeys(_COUNTERS, 0)
        self._finish_reasons: dict[str, int] = {}
        self._failed = 0
        self._first_arrival: float | None = None
        self._last_result = 0.0
        self._last_delta: dict[tuple[str, int], float] = {}

    def count(self, records: list[Any], now: float) -> None:
        """Count records that pass at monotonic time `now`."""
        completions: list[Completion] = []
        for record in records:
            if isinstance(record, Completion):
                completions.append(record)
            elif isinstance(record, TokenDelta):
                self._count_delta(record, now)
            elif isinstance(record, DeadLetter):
                self._failed += 1
        if completions:
            self._count_completions(completions, now)

    def summary(self) -> MetricsSummary:
        """The figures so far."""
        requests = sum(self._finish_reasons.values())
        output_tokens = self._counters["generation_tokens_total"]
        elapsed = 0.0 if self._first_arrival is None else self._last_result - self._first_arrival
        rate = 1 / elapsed if elapsed > 0 else 0.0
        return MetricsSummary(
            requests=requests,
            failed=self._failed,
            finish_reasons=dict(self._finish_reasons),
            prompt_tokens=self._counters["prompt_tokens_total"],
            output_tokens=output_tokens,
            prefix_hit_tokens=self._counters["prefix_cache_hits_total"],
            elapsed_s=elapsed,
            requests_per_s=requests * rate,
            output_tokens_per_s=output_tokens * rate,
            queue_ms=self._percentiles("request_queue_time_seconds"),
            ttft_ms=self._percentiles("time_to_first_token_seconds"),
            tpot_ms=self._percentiles("request_time_per_output_token_seconds"),
            itl_ms=self._percentiles("inter_token_latency_seconds"),
            e2e_ms=self._percentiles("e2e_request_latency_seconds"),
        )

    def expose(self, blocks: BlockTimes | None, tiers: TierStats | None) -> str:
        """The figures so far, with those of the KV cache, in Prometheus' text exposition format, version 0.0.4."""
        success = "sagellm:request_success_total"
        lines = [f"# HELP {success} Requests with a completion.", f"# TYPE {success} counter"]
        lines += [f'{success}{{finished_reason="{reason}"}} {n}' for reason, n in sorted(self._finish_reasons.items())]
        failed = "sagellm:request_failure_total"
        lines += [f"# HELP {failed} Dead letters that passed.", f"# TYPE {failed} counter", f"{failed} {self._failed}"]
        for name, help_text in _COUNTERS.items():
            full = f"sagellm:{name}"
            lines += [f"# HELP {full} {help_text}", f"# TYPE {full} counter", f"{full} {self._counters[name]}"]
        for name, (_, help_text) in _HISTOGRAMS.items():
            full = f"sagellm:{name}"
            lines += [f"# HELP {full} {help_text}", f"# TYPE {full} histogram", *self._histograms[name].expose(full)]
        for name, help_text in _BLOCK_HISTOGRAMS.items() if blocks is not None else ():
            full, histogram = f"sagellm:kv_block_{name}_seconds", getattr(blocks, name)
            lines += [f"# HELP {full} {help_text}", f"# TYPE {full} histogram", *histogram.expose(full)]
        for name, (help_text, kind, values) in _tier_figures(tiers).items() if tiers is not None else ():
            full = f"sagellm:{name}"
            lines += [f"# HELP {full} {help_text}", f"# TYPE {full} {kind}"]
            lines += [f"{full}{labels} {value}" for labels, value in values.items()]
        return "\n".join(lines) + "\n"

    def _count_completions(self, completions: list[Completion], now: float) -> None:
        earliest = min(completion.request.arrival for completion in completions)
        self._first_arrival = earliest if self._first_arrival is None else min(self._first_arrival, earliest)
        self._last_result = now
        for completion in completions:
            reason = str(completion.choices[0].finish_reason)
            self._finish_reasons[reason] = self._finish_reasons.get(reason, 0) + 1
            if completion.request.stream:
                for choice in completion.choices:
                    self._last_delta.pop((completion.request_id, choice.index), None)
        prompts = [completion.prompt_length for completion in completions]
        outputs = [completion.output_length for completion in completions]
        metrics = [completion.metrics for completion in completions]
        counters, histograms = self._counters, self._histograms
        counters["prompt_tokens_total"] += sum(prompts)
        counters["generation_tokens_total"] += sum(outputs)
        counters["prefix_cache_queries_total"] += sum(prompts)
        counters["prefix_cache_hits_total"] += sum(each.prefix_hit_tokens for each in metrics)
        histograms["request_prompt_tokens"].observe_all(prompts)
        histograms["request_generation_tokens"].observe_all(
            [length for each, length in zip(completions, outputs, strict=True) if each.request.pooling is None]
        )
        histograms["request_queue_time_seconds"].observe_all([each.queue_ms / 1000 for each in metrics])
        histograms["e2e_request_latency_seconds"].observe_all([each.e2e_ms / 1000 for each in metrics])
        histograms["time_to_first_token_seconds"].observe_all(
            [each.ttft_ms / 1000 for each, length in zip(metrics, outputs, strict=True) if length]
        )
        histograms["request_time_per_output_token_seconds"].observe_all([
            completion.metrics.tpot_ms / 1000
            for completion in completions
            if any(len(choice.output_tokens) > 1 for choice in completion.choices)
        ])  # fmt: skip

    def _count_delta(self, delta: TokenDelta, now: float) -> None:
        if not delta.tokens:
            return
        key = (delta.request_id, delta.choice)
        before = self._last_delta.pop(key, None)
        if before is not None:
            gap = (now - before) / len(delta.tokens)
            self._histograms["inter_token_latency_seconds"].observe(gap, len(delta.tokens))
        self._last_delta[key] = now
        if len(self._last_delta) > _STREAMS_WATCHED:  # a stream that failed has no completion to end it
            del self._last_delta[next(iter(self._last_delta))]

    def _percentiles(self, name: str) -> Percentiles:
        histogram = self._histograms[name]
        return Percentiles(histogram.mean * 1000, *(histogram.quantile(q) * 1000 for q in (0.5, 0.9, 0.99)))


def _tier_figures(tiers: TierStats) -> dict[str, tuple[str, str, dict[str, int]]]:
    """Of KV tiers, by name: what it is, its type, and its values by label."""
    ddr, nvme = '{tier="ddr"}', '{tier="nvme"}'
    return {
        "kv_tier_hit_tokens_total": (
            "Tokens whose KV was brought up from a tier.",
            "counter",
            {ddr: tiers.ddr_hit_tokens, nvme: tiers.nvme_hit_tokens},
        ),
        "kv_tier_moved_bytes_total": (
            "Bytes copied between tiers.",
            "counter",
            {
                '{from="hbm",to="ddr"}': tiers.bytes_hbm_to_ddr,
                '{from="ddr",to="nvme"}': tiers.bytes_ddr_to_nvme,
                '{from="ddr",to="hbm"}': tiers.bytes_ddr_to_hbm,
                '{from="nvme",to="hbm"}': tiers.bytes_nvme_to_hbm,
            },
        ),
        "kv_tier_fetch_failures_total": (
            "Blocks that were there and could not be brought up.",
            "counter",
            {"": tiers.fetch_failures},
        ),
        "kv_tier_lost_blocks_total": (
            "Blocks that the pool gave up and no tier kept.",
            "counter",
            {"": tiers.lost_blocks},
        ),
        "kv_tier_unexported_blocks_total": (
            "Blocks of prompts whose KV was to be exported and is not in files.",
            "counter",
            {"": tiers.unexported_blocks},
        ),
        "kv_tier_blocks": ("Blocks in a tier now.", "gauge", {ddr: tiers.ddr_blocks, nvme: tiers.nvme_blocks}),
    }


class MetricsConfig(OperatorConfig):
    """`path` is a file for Prometheus' text format, replaced as a whole at most every `interval_s` and at the end."""

    path: Annotated[str, Field(min_length=1)] | None = None
    interval_s: Annotated[float, Field(gt=0)] = 5.0


@operator("metrics")
class Metrics(Operator[MetricsConfig]):
    """Counts what passes: requests by finish reason, tokens, prefix hits, TTFT, TPOT, ITL, queue and E2E times.

    Every record goes on unchanged and in order. `summary` gives the figures at any time, `expose` the same in
    Prometheus' text format under vLLM's metric names (`sagellm:time_to_first_token_seconds` ...), and how long cached
    KV blocks live, rest before they are evicted and wait for their next use. Memory does not
    grow with the number of requests.
    """

    config_model = MetricsConfig
    inputs = (Port("in", frozenset({RecordKind.COMPLETION, RecordKind.DELTA, RecordKind.DEAD_LETTER})),)
    outputs = (Port("out", same_as="in"),)
    provides = frozenset({"measured"})
    guarantee = "one record out for each record in, unchanged and in order"
    writes = "path"
    example = """\
operators:
  metrics: {type: metrics, path: metrics.prom, interval_s: 10}
edges:
  - detokenize -> metrics -> done
"""

    def __init__(self, config: MetricsConfig, context: OperatorContext) -> None:
        super().__init__(config, context)
        self.path = None if config.path is None else context.base_dir / config.path
        self._figures: Figures = context.kept.setdefault("figures", Figures())
        self._next_write = 0.0

    async def process(self, records: list[Any], out: Outlet) -> None:
        now = time.monotonic()
        self._figures.count(records, now)
        await out.send(records)
        if self.path is not None and now >= self._next_write:
            self._write_file()
            self._next_write = now + self.config.interval_s

    async def close(self) -> None:
        if self.path is not None:
            self._write_file()

    def summary(self) -> MetricsSummary:
        """The figures so far, of all instances in the run."""
        return self._figures.summary()

    def expose(self) -> str:
        """The same in Prometheus' text exposition format, version 0.0.4."""
        engine = self.context.engine
        if engine is None:
            return self._figures.expose(None, None)
        return self._figures.expose(engine.block_times(), engine.tier_stats())

    def _write_file(self) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(self.expose(), encoding="utf-8")
        os.replace(partial, self.path)
