"""`sagellm run`: run a pipeline until its sources end, and say how it went."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from ..errors import ConfigError, FlowError
from .common import pipeline_arguments, read_pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import anyio

    from ..graph import Pipeline
    from ..operators.sources.jsonl_source import JsonlSource
    from ..runtime.flow.flow import Flow
    from ..runtime.services import EngineServices
    from .progress import Reporter


@click.command("run")
@pipeline_arguments
@click.option("--quiet", "-q", is_flag=True, help="No progress and no summary; errors are still told.")
def command(path: Path, overrides: tuple[str, ...], allow_modules: tuple[str, ...], quiet: bool) -> None:
    """Run PIPELINE. SIGTERM or Ctrl-C finishes what is being computed; a second one, or one at loading, stops at once.

    Exit codes: 0 done, 1 the run failed (an operator, lost records, too many bad ones, a gate), 78 the pipeline is
    wrong.
    """
    run_pipeline(read_pipeline(path, overrides, allow_modules), quiet)


def run_pipeline(pipeline: Pipeline, quiet: bool) -> None:
    """Run a pipeline to its end, and say on stderr how it goes.

    Raises:
        SageLLMError: it cannot run, or has failed.
    """
    import anyio

    from .progress import make_reporter

    if not anyio.run(_run, pipeline, make_reporter(quiet)):
        sys.stderr.flush()
        os._exit(0)  # Python would wait for the thread that loads the model


def _check_inputs(pipeline: Pipeline) -> None:
    """Say that an input is missing before a model is loaded for it.

    Raises:
        ConfigError: a file that an operator reads is not there.
    """
    for node in pipeline.nodes.values():
        written = getattr(node.config, node.spec.reads or "", None)
        if written is not None and not (pipeline.base_dir / written).exists():
            where = pipeline.base_dir / written
            raise ConfigError(f"{written}: no such file, but {node.name!r} reads it (looked for {where})")


async def _run(pipeline: Pipeline, reporter: Reporter) -> bool:
    """Run to the end, or to that of what is in flight; False when a signal came while the model was loading."""
    import anyio

    from ..benchmarks.gates import check_gates
    from ..operators.metrics import Metrics
    from ..operators.sources.jsonl_source import JsonlSource
    from ..runtime.assembly import assemble
    from ..runtime.flow.groups import lone_error_unwrapped
    from ..runtime.flow.signals import drain_on_signals
    from ..runtime.garbage import collect_rarely
    from ..runtime.services import EngineServices

    _check_inputs(pipeline)
    services = EngineServices(pipeline.engine)
    flow = assemble(pipeline, services)
    needed = services.is_needed_by(pipeline)
    with lone_error_unwrapped():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drain_on_signals, flow)
            try:
                async with flow.claimed():
                    if needed and not await _load(pipeline, services, flow, reporter):
                        reporter.summarize(flow.report(), [], [])
                        return False
                    collect_rarely()
                    async with services.running(needed):
                        tasks.start_soon(reporter.follow, flow)
                        report = await flow.run()
            finally:
                tasks.cancel_scope.cancel()
    summaries = [operator.summary() for operator in flow.operators.values() if isinstance(operator, Metrics)]
    sources = [operator for operator in flow.operators.values() if isinstance(operator, JsonlSource)]
    reporter.summarize(report, summaries, [*_notes(sources, services)])
    lost = {name: stats["lost"] for name, stats in report.operators.items() if stats["lost"]}
    if lost:
        told = ", ".join(f"{name!r} {count}" for name, count in lost.items())
        raise FlowError(f"records are lost, since the operators that rejected them have no error port: {told}")
    if summaries:
        check_gates(pipeline.engine.benchmark, summaries[0])
    return True


def _notes(sources: list[JsonlSource], services: EngineServices) -> Iterator[str]:
    if skipped := sum(source.skipped_lines for source in sources):
        yield f"{skipped} lines stood in the output already"
    tiers = services.tier_stats()
    if tiers is not None and tiers.unexported_blocks:
        yield f"{tiers.unexported_blocks} KV blocks not exported"


async def _load(pipeline: Pipeline, services: EngineServices, flow: Flow, reporter: Reporter) -> bool:
    """Load the model; False, while it still loads, when the flow is drained: it has read nothing that it must finish.

    Raises:
        ModelError: the model cannot be found, read or built.
        ConfigError: the device or the KV pool cannot be had.
    """
    import anyio

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_cancel_when_drained, tasks.cancel_scope, flow)
        with reporter.loading(pipeline):
            await anyio.to_thread.run_sync(services.load, abandon_on_cancel=True)
        tasks.cancel_scope.cancel()
    return flow.report().drained is None


async def _cancel_when_drained(scope: anyio.CancelScope, flow: Flow) -> None:
    await flow.draining.wait()
    scope.cancel()
