"""`sagellm simulate`: a pipeline's scheduler on a trace of requests, in virtual time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..config import KVEviction, SchedulerMode, SchedulerPolicy
from ..errors import ConfigError
from .common import check_known, pipeline_arguments, read_pipeline

if TYPE_CHECKING:
    from enum import StrEnum

_POSITIVE = click.FloatRange(0, min_open=True)


def _choice(names: type[StrEnum]) -> click.Choice[str]:
    return click.Choice([name.value for name in names], case_sensitive=False)


def _check_workers(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    for workers in given:
        if not re.fullmatch(r"[1-9]\d*(\+[1-9]\d*)?", workers):
            raise click.BadParameter(f"{workers!r} is no number of workers: write 2, or 1+1 for mode strict")
    return given


@click.command("simulate")
@pipeline_arguments
@click.option(
    "--trace",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON lines: timestamp (ms), input_length, output_length; maybe hash_ids, tenant, priority, deadline_ms.",
)
@click.option("--device", default="h200", show_default=True, help="h200, h100, a100: presets; local: this machine.")
@click.option("--mode", "modes", multiple=True, type=_choice(SchedulerMode), help="Repeatable, as ...")
@click.option("--policy", "policies", multiple=True, type=_choice(SchedulerPolicy), help="... are these ...")
@click.option("--eviction", "evictions", multiple=True, type=_choice(KVEviction), help="... three.")
@click.option(
    "--workers",
    multiple=True,
    metavar="N|P+D",
    callback=_check_workers,
    help="Engines behind a router; in mode strict prefill and decode workers. Repeatable. Default: 1, as configured.",
)
@click.option(
    "--routing",
    default="least_loaded",
    show_default=True,
    type=click.Choice(["round_robin", "least_loaded", "prefix_aware"]),
    help="Which engine gets a request.",
)
@click.option("--rate-scale", "rate_scales", multiple=True, default=(1.0,), type=_POSITIVE, help="Repeatable.")
@click.option("--spread", is_flag=True, help="Spread what the trace has at one moment evenly up to its next.")
@click.option("--limit", type=click.IntRange(1), help="Only the trace's first requests.")
@click.option("--ttft-slo-ms", multiple=True, default=(2000.0,), type=_POSITIVE, help="A goodput for each pair ...")
@click.option("--tpot-slo-ms", multiple=True, default=(50.0,), type=_POSITIVE, help="... of these. Default: 2000, 50.")
def command(
    path: Path,
    overrides: tuple[str, ...],
    allow_modules: tuple[str, ...],
    trace: Path,
    device: str,
    modes: tuple[str, ...],
    policies: tuple[str, ...],
    evictions: tuple[str, ...],
    workers: tuple[str, ...],
    routing: str,
    rate_scales: tuple[float, ...],
    spread: bool,
    limit: int | None,
    ttft_slo_ms: tuple[float, ...],
    tpot_slo_ms: tuple[float, ...],
) -> None:
    """Replay a trace through PIPELINE's scheduler, KV cache and workers in virtual time; no weights are loaded.

    One row for each combination of what is repeated. The same input gives the same rows, but for the last column.
    """
    pipeline = read_pipeline(path, overrides, allow_modules)
    from ..accel.device_presets import DEVICES
    from ..benchmarks.simulated_device import LOCAL, make_target
    from ..benchmarks.simulation import Objective, format_rows, run_scenario, scenarios
    from ..benchmarks.traces import TraceReplay, read_requests
    from ..runtime.garbage import collect_rarely
    from ..runtime.simulation.cluster import Routing
    from ..runtime.simulation.engine import Stages

    check_known("--device", "device", [device], (LOCAL, *DEVICES))
    if len(ttft_slo_ms) != len(tpot_slo_ms):
        raise click.UsageError(f"{len(ttft_slo_ms)} --ttft-slo-ms, but {len(tpot_slo_ms)} --tpot-slo-ms: give pairs")
    objectives = [Objective(*pair) for pair in zip(ttft_slo_ms, tpot_slo_ms, strict=True)]
    try:
        combinations = [*scenarios(pipeline.engine, modes, policies, evictions, workers, rate_scales)]
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    replay = TraceReplay(read_requests(trace)[:limit], spread)
    stages, target = Stages.of(pipeline), make_target(pipeline.engine, device)
    collect_rarely()
    rows = [
        run_scenario(each, pipeline.engine, stages, target, replay, Routing(routing), objectives)
        for each in combinations
    ]
    click.echo(format_rows(rows, objectives, tiered=pipeline.engine.kv_cache.enable_tiering))
