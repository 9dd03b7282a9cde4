"""What `sagellm run` shows: a live line on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import anyio

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from ..graph import Pipeline
    from ..operators.metrics import MetricsSummary
    from ..runtime.flow.flow import Flow, FlowReport

PLAIN_INTERVAL_S = 5.0
_LIVE_INTERVAL_S = 0.2


class Reporter(Protocol):
    """Tells a person how a run goes."""

    def loading(self, pipeline: Pipeline) -> AbstractContextManager[None]:
        """Around the loading of the model."""
        ...

    async def follow(self, flow: Flow) -> None:
        """Show progress until cancelled."""
        ...

    def summarize(self, report: FlowReport, summaries: list[MetricsSummary], notes: list[str]) -> None:
        """Show the end, and after the counts `notes`."""
        ...


def make_reporter(quiet: bool) -> Reporter:
    """Live on a terminal, plain lines otherwise, nothing when quiet. Everything goes to stderr."""
    if quiet:
        return _Quiet()
    return _Live() if sys.stderr.isatty() else _Plain()


class _Quiet:
    @contextmanager
    def loading(self, pipeline: Pipeline) -> Iterator[None]:
        yield

    async def follow(self, flow: Flow) -> None:
        await anyio.sleep_forever()

    def summarize(self, report: FlowReport, summaries: list[MetricsSummary], notes: list[str]) -> None:
        """Quiet."""


async def _tell_addresses(flow: Flow) -> None:
    """Say where the sources listen that do, once they answer."""
    await flow.running.wait()
    for name, operator in flow.operators.items():
        if operator.address is not None:
            print(f"{name} is ready on {operator.address}", file=sys.stderr, flush=True)


def _describe(flow: Flow) -> str:
    """One line: requests, tokens per second, TTFT, prefix hits."""
    from ..operators.metrics import Metrics

    counters = flow.ledger.counters()
    ends = [("done", "done"), ("error", "failed"), ("cancelled", "cancelled"), ("shed", "shed")]
    told = [f"{counters[name]} {word}" for name, word in ends if counters[name] or name == "done"]
    parts = [f"{', '.join(told)}, {counters['in_flight']} in flight"]
    reason = flow.report().drained
    if reason is not None:
        parts.insert(0, f"{reason}: finishing what is in flight, a second signal stops at once:")
    for operator in flow.operators.values():
        if isinstance(operator, Metrics):
            summary = operator.summary()
            parts.append(f"{summary.output_tokens_per_s:.0f} tok/s")
            parts.append(f"TTFT p50 {summary.ttft_ms.p50:.0f} ms")
            parts.append(f"prefix hits {summary.prefix_hit_ratio:.0%}")
            break
    return "  ".join(parts)


def _share(flow: Flow) -> tuple[float, float | None]:
    """Lines that are finished, and all lines, estimated while files are read (None: there is no telling)."""
    from ..operators.sources.jsonl_source import JsonlSource

    sources = [operator for operator in flow.operators.values() if isinstance(operator, JsonlSource)]
    counters = flow.ledger.counters()
    skipped = sum(source.skipped_lines for source in sources)
    read_bytes, size_bytes = sum(s.read_bytes for s in sources), sum(s.size_bytes for s in sources)
    finished = counters["accepted"] - counters["in_flight"] + skipped
    return finished, (counters["accepted"] + skipped) * size_bytes / read_bytes if read_bytes else None


class _Plain:
    @contextmanager
    def loading(self, pipeline: Pipeline) -> Iterator[None]:
        start = time.perf_counter()
        model = pipeline.engine.model.model_id
        print(f"{pipeline.name}: loading {model}", file=sys.stderr, flush=True)
        yield
        print(f"{pipeline.name}: ready after {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

    async def follow(self, flow: Flow) -> None:
        await _tell_addresses(flow)
        told = ""
        while True:
            await anyio.sleep(PLAIN_INTERVAL_S)
            if (line := _describe(flow)) != told:  # a server may be idle for days
                print(line, file=sys.stderr, flush=True)
                told = line

    def summarize(self, report: FlowReport, summaries: list[MetricsSummary], notes: list[str]) -> None:
        _print_summary(report, summaries, notes)


class _Live:
    @contextmanager
    def loading(self, pipeline: Pipeline) -> Iterator[None]:
        from rich.console import Console

        with Console(stderr=True).status(f"loading {pipeline.engine.model.model_id}"):
            yield

    async def follow(self, flow: Flow) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        await _tell_addresses(flow)
        columns = (TimeElapsedColumn(), BarColumn(bar_width=12), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("starting", total=None)
            while True:
                finished, total = _share(flow)
                progress.update(task, description=_describe(flow), completed=finished, total=total)
                await anyio.sleep(_LIVE_INTERVAL_S)

    def summarize(self, report: FlowReport, summaries: list[MetricsSummary], notes: list[str]) -> None:
        _print_summary(report, summaries, notes)


def _print_summary(report: FlowReport, summaries: list[MetricsSummary], notes: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    counts = report.counters
    for summary in summaries:
        if not summary.requests:
            continue
        table = Table(title=f"{counts['accepted']} requests in {report.seconds:.2f} s", title_justify="left")
        table.add_column("")
        for name in ("mean", "p50", "p90", "p99"):
            table.add_column(name, justify="right")
        for label, figures in (
            ("queue ms", summary.queue_ms),
            ("TTFT ms", summary.ttft_ms),
            ("TPOT ms", summary.tpot_ms),
            ("E2E ms", summary.e2e_ms),
        ):
            cells = (figures.mean, figures.p50, figures.p90, figures.p99)
            table.add_row(label, *(f"{figure:.1f}" for figure in cells))
        console.print(table)
        console.print(
            f"{summary.output_tokens} output tokens, {summary.output_tokens_per_s:.0f} tok/s, "
            f"{summary.requests_per_s:.1f} requests/s, prefix hits {summary.prefix_hit_tokens} tokens "
            f"({summary.prefix_hit_ratio:.0%})",
            highlight=False,
        )
    outcomes = [f"{name} {counts[name]}" for name in ("done", "error", "cancelled", "shed") if counts[name]]
    outcomes += notes
    outcomes += [f"stopped early: {report.drained}"] * (report.drained is not None)
    console.print("  ".join(outcomes) or "no requests", highlight=False)
