"""`sagellm bench`: what is measured prints a table; nothing here judges."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import ConfigError
from .common import check_known


@click.group("bench")
def command() -> None:
    """Measure this engine: against its own floor, or against a peer in the same run."""


@command.command("overhead")
@click.option("--requests", default=20_000, show_default=True, type=click.IntRange(1), help="How many requests.")
@click.option("--batch", default=512, show_default=True, type=click.IntRange(1), help="Sequences that run at once.")
@click.option("--profile", is_flag=True, help="Also print where the CPU time went, by stage.")
def overhead(requests: int, batch: int, profile: bool) -> None:
    """The engine's own cost: the whole pipeline, file to file, on a null model (64 tokens in, 32 out)."""
    from ..benchmarks.measurement import format_table
    from ..benchmarks.overhead import measure_overhead

    report = measure_overhead(requests, batch, profile)
    if report.profile:
        click.echo(report.profile)
    click.echo(format_table([*report.columns], [report.row()]))


@command.command("sockets")
@click.option("--requests", default=10_000, show_default=True, type=click.IntRange(1), help="How many requests.")
@click.option("--batch", default=512, show_default=True, type=click.IntRange(1), help="Sequences that run at once.")
@click.option(
    "--connections", default=8, show_default=True, type=click.IntRange(1), help="Clients, in a process apart."
)
@click.option("--stream", is_flag=True, help="Each request streams its tokens.")
def sockets(requests: int, batch: int, connections: int, stream: bool) -> None:
    """The same over TCP connections, beside `overhead` in this process."""
    from ..benchmarks.measurement import format_table
    from ..benchmarks.overhead import OverheadReport, measure_overhead
    from ..benchmarks.sockets import measure_sockets

    over_sockets = measure_sockets(requests, batch, connections, stream)
    rows = [["sockets", *over_sockets.row()], ["files", *measure_overhead(requests, batch).row()]]
    click.echo(format_table(["", *OverheadReport.columns], rows))


@command.command("http")
@click.option("--seconds", default=5.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Each load.")
@click.option("--connections", default=128, show_default=True, type=click.IntRange(1), help="Requests at once.")
def http(seconds: float, connections: int) -> None:
    """The HTTP API's cost on a null model, beside an application that only streams the same chunks."""
    from ..benchmarks.http import measure_http

    click.echo(measure_http(seconds, connections))


@command.command("compare")
@click.option("--peer", default="transformers", show_default=True, help="The engine to compare with.")
@click.option("--workload", "workloads", multiple=True, help="One of the workloads; repeatable. Default: all.")
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float32"]))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="CPU threads for each engine.")
@click.option("--runs", default=1, show_default=True, type=click.IntRange(1), help="Runs of each; the best counts.")
def compare_command(peer: str, workloads: tuple[str, ...], dtype: str, threads: int, runs: int) -> None:
    """Ratios to a peer: same checkpoint, same requests, same machine, same run."""
    from ..benchmarks.compare import compare, format_comparison
    from ..benchmarks.contenders import PEERS
    from ..benchmarks.workloads import WORKLOADS

    check_known("--peer", "peer", [peer], PEERS)
    check_known("--workload", "workload", workloads, WORKLOADS)
    results = compare(workloads or WORKLOADS, peer, dtype, threads, runs, lambda text: click.echo(text, err=True))
    click.echo(format_comparison(results))


@command.command("kernels")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="CPU threads; 0 is every core.")
@click.option("--backend", type=click.Choice(["cpu", "cuda"]), help="The device. Default: CUDA where there is one.")
@click.option("--operation", "operations", multiple=True, help="One of the operations; repeatable. Default: all.")
@click.option("--seconds", default=0.3, show_default=True, type=click.FloatRange(0), help="For each timing.")
def kernels(threads: int, backend: str | None, operations: tuple[str, ...], seconds: float) -> None:
    """Linear layers, attention and what lies between, of this device, against its floor."""
    from ..benchmarks.kernels import OPERATIONS, measure_kernels
    from ..config import BackendConfig, BackendType

    check_known("--operation", "operation", operations, OPERATIONS)
    config = BackendConfig(backend_type=None if backend is None else BackendType(backend), threads=threads)
    click.echo(measure_kernels(config, operations or OPERATIONS, seconds))


@command.command("step-time")
@click.option("--shape", default="qwen2.5-0.5b", show_default=True, help="The model's shape; weights are random.")
@click.option("--backend", type=click.Choice(["cpu", "cuda"]), help="The device. Default: CUDA where there is one.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="CPU threads; 0 is every core.")
@click.option("--batches", default=20, show_default=True, type=click.IntRange(1), help="Random steps of each kind.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Runs of each; the median counts.")
@click.option("--seed", default=1, show_default=True, type=int, help="Of the random steps.")
@click.option("--fresh", is_flag=True, help="Measure the device's rates now, even if they are known.")
@click.option("--each", is_flag=True, help="Also print every step.")
def step_time(
    shape: str, backend: str | None, threads: int, batches: int, rounds: int, seed: int, fresh: bool, each: bool
) -> None:
    """A step's predicted time beside its measured one, on steps that the prediction was not made from."""
    from ..benchmarks.step_time import format_errors, time_steps
    from ..benchmarks.workloads import SHAPES
    from ..config import BackendConfig, BackendType

    check_known("--shape", "shape", [shape], SHAPES)
    config = BackendConfig(backend_type=None if backend is None else BackendType(backend), threads=threads)
    steps = time_steps(config, shape, batches, rounds, seed, fresh, lambda text: click.echo(text, err=True))
    click.echo(format_errors(steps, each))


@command.command("simulation")
@click.option("--device", default="local", show_default=True, help="local runs the model; h200, h100, a100 wait.")
@click.option("--shape", default="qwen2.5-0.5b", show_default=True, help="The model's dimensions.")
@click.option("--requests", default=40, show_default=True, type=click.IntRange(2), help="How many.")
@click.option("--rate", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True), help="A second.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="CPU threads; 0 is every core.")
def simulation(device: str, shape: str, requests: int, rate: float, threads: int) -> None:
    """What `sagellm simulate` predicts for Poisson arrivals, and what the real engine does with them.

    On a preset only the device is not real: it answers when the preset's would have.
    """
    from ..accel.device_presets import DEVICES
    from ..benchmarks.measurement import format_table
    from ..benchmarks.simulated_device import LOCAL
    from ..benchmarks.simulation_check import check_simulation
    from ..benchmarks.workloads import SHAPES

    check_known("--shape", "shape", [shape], SHAPES)
    check_known("--device", "device", [device], (LOCAL, *DEVICES))
    rows = check_simulation(shape, device, requests, rate, threads)
    click.echo(format_table(["figure", "measured", "predicted", "error"], rows))


@command.command("slo")
@click.option("--slo-ms", default=150.0, show_default=True, type=click.FloatRange(1), help="scheduler.tpot_slo_ms.")
@click.option("--shape", default="qwen2.5-0.5b", show_default=True, help="The model's shape; weights are random.")
@click.option("--backend", type=click.Choice(["cpu", "cuda"]), help="The device. Default: CUDA where there is one.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="CPU threads; 0 is every core.")
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(1), help="In which requests arrive.")
@click.option("--chats", default=0.4, show_default=True, type=click.FloatRange(0, min_open=True), help="A second.")
@click.option("--documents", default=0.08, show_default=True, type=click.FloatRange(0, min_open=True), help="A second.")
@click.option("--document-tokens", default=2048, show_default=True, type=click.IntRange(1), help="Of each document.")
@click.option("--runs", default=1, show_default=True, type=click.IntRange(1), help="Of each, in turn.")
def slo(
    slo_ms: float,
    shape: str,
    backend: str | None,
    threads: int,
    seconds: float,
    chats: float,
    documents: float,
    document_tokens: int,
    runs: int,
) -> None:
    """Latencies of chats (64 tokens in, 96 out) while documents are read, with and without scheduler.tpot_slo_ms."""
    from ..benchmarks.slo import MixedLoad, compare_slo, format_served
    from ..benchmarks.workloads import SHAPES

    check_known("--shape", "shape", [shape], SHAPES)
    load = MixedLoad(seconds, chats, documents, document_tokens)
    device = {"backend_type": backend, "threads": threads}
    click.echo(format_served(compare_slo(device, shape, slo_ms, load, runs, lambda text: click.echo(text, err=True))))


@command.command("plan")
@click.option("--running", default=256, show_default=True, type=click.IntRange(1), help="Rows that decode.")
@click.option("--waiting", default=1000, show_default=True, type=click.IntRange(0), help="Sequences that wait.")
@click.option("--steps", default=2000, show_default=True, type=click.IntRange(1), help="How many are timed.")
@click.option("--policy", "policies", multiple=True, help="The order of what waits; repeatable. Default: all.")
def plan(running: int, waiting: int, steps: int, policies: tuple[str, ...]) -> None:
    """Microseconds to plan a step, and to grant leases before it, on a null model."""
    from ..benchmarks.measurement import format_table
    from ..benchmarks.planning import measure_planning
    from ..config import SchedulerPolicy

    known = [policy.value for policy in SchedulerPolicy]
    check_known("--policy", "policy", policies, known)
    cases: list[tuple[str, str, float | None]] = [(policy, "hybrid", None) for policy in policies or known]
    cases += [("fcfs", "time_share", None), ("fcfs", "hybrid", 12.0)] if not policies else []
    rows = []
    for policy, mode, slo_ms in cases:
        name = f"{policy}, {mode}" + (f", tpot_slo_ms {slo_ms:g}" if slo_ms else "")
        rows.append([name, *measure_planning(running, waiting, steps, policy, mode, slo_ms).row()])
    header = ["scheduler", "plan us", "grant us", "both us", "both p99 us"]
    click.echo(f"medians over {steps} steps, {running} running and {waiting} waiting")
    click.echo(format_table(header, rows))


@command.command("radix")
@click.option(
    "--blocks", default=1_000_000, show_default=True, type=click.IntRange(1), help="Of 16 tokens, in the pool."
)
@click.option("--tokens", default=32_768, show_default=True, type=click.IntRange(3), help="Of each prompt.")
@click.option("--repeats", default=200, show_default=True, type=click.IntRange(1))
@click.option(
    "--eviction", default="lru", show_default=True, type=click.Choice(["lru", "lfu", "cost"], case_sensitive=False)
)
def radix(blocks: int, tokens: int, repeats: int, eviction: str) -> None:
    """What a lookup, an insert and an eviction take in a prefix tree that fills its pool."""
    from ..benchmarks.measurement import format_table
    from ..benchmarks.radix import measure_radix
    from ..config import KVEviction

    if blocks * 16 < 2 * tokens:
        raise click.UsageError(f"{blocks} blocks of 16 do not hold two prompts of {tokens} tokens: give more of them")
    times = measure_radix(blocks, tokens, KVEviction(eviction), repeats)
    click.echo(format_table(["", "median ms", "p99", "longest"], times.rows()))


@command.command("isolation")
@click.option("--model", "models", multiple=True, help="A model id; repeatable. Default: builtin:null, pydoc-tiny.")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Rows that decode.")
@click.option("--steps", default=200, show_default=True, type=click.IntRange(1), help="Steps of a round.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="CPU threads of the model.")
def isolation(models: tuple[str, ...], batch: int, steps: int, threads: int) -> None:
    """What a step costs more with scheduler.isolation: process, one step at a time and two launched at once."""
    from ..benchmarks.isolation import measure_isolation
    from ..benchmarks.measurement import format_table

    rows = []
    for model in models or ("builtin:null", "builtin:pydoc-tiny"):
        for depth in (1, 2):
            report = measure_isolation(model, batch, steps, threads, depth)
            times = [f"{min(times):.0f}" for times in (report.thread_us, report.process_us)]
            rows.append([model, f"{depth}", *times, f"{report.overhead_us:.0f}"])
    header = ["model", "launched", "thread us", "process us", "more us"]
    click.echo(
        f"a step of {batch} decoding rows: the best of the rounds, and the median of what the process takes more"
    )
    click.echo(format_table(header, rows))


@command.command("guide")
@click.option("--shape", default="qwen2.5-0.5b", show_default=True, help="The model's shape; weights are random.")
@click.option("--backend", type=click.Choice(["cpu", "cuda"]), help="The device. Default: CUDA where there is one.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="CPU threads; 0 is every core.")
@click.option("--rows", default=16, show_default=True, type=click.IntRange(1), help="Rows that decode.")
@click.option("--steps", default=64, show_default=True, type=click.IntRange(1), help="Steps of a round.")
def guide(shape: str, backend: str | None, threads: int, rows: int, steps: int) -> None:
    """What a step costs more with rows guided by a JSON schema: masks found before it, and while it computes."""
    from ..benchmarks.guide import measure_guide
    from ..benchmarks.measurement import format_table
    from ..benchmarks.workloads import SHAPES
    from ..config import BackendConfig, BackendType

    if shape not in SHAPES:
        raise click.BadParameter(f"no shape {shape!r}; there is: {', '.join(SHAPES)}", param_hint="--shape")
    config = BackendConfig(backend_type=None if backend is None else BackendType(backend), threads=threads)
    times = measure_guide(config, shape, rows, steps)
    table = []
    for depth, masks in ((1, "before the step"), (2, "while it computes")):
        plain, guided = times[False, depth], times[True, depth]
        table.append([masks, f"{plain:.0f}", f"{guided:.0f}", f"{guided - plain:.0f}", f"{guided / plain - 1:+.1%}"])
    click.echo(f"a step of {rows} rows: medians of rounds in turn")
    click.echo(format_table(["masks are found", "plain us", "guided us", "more us", "more"], table))


@command.command("kv-trace")
@click.option(
    "--trace",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON lines, each a request with its hash_ids, as published by Mooncake.",
)
@click.option(
    "--blocks",
    "sizes",
    multiple=True,
    default=(5_000, 10_000, 20_000, 0),
    show_default=True,
    type=click.IntRange(0),
    help="Blocks in the pool, 0 for as many as the trace fills; repeatable.",
)
@click.option(
    "--eviction",
    "policies",
    multiple=True,
    default=("lru", "lfu", "cost"),
    show_default=True,
    type=click.Choice(["lru", "lfu", "cost"], case_sensitive=False),
    help="The policy; repeatable.",
)
def kv_trace(trace: Path, sizes: tuple[int, ...], policies: tuple[str, ...]) -> None:
    """Hit rates of the prefix cache on a trace of requests: blocks found, of those looked up.

    What that saves of the time to compute the prompts is an estimate, for 7 to 8 billion parameters.
    """
    from ..benchmarks.kv_trace import replay
    from ..benchmarks.measurement import format_table
    from ..benchmarks.traces import read_block_ids
    from ..config import KVEviction

    requests, rows = read_block_ids(trace), []
    for size in sizes:
        for policy in policies:
            try:
                result = replay(requests, size or None, KVEviction(policy))
            except ConfigError as error:
                raise click.BadParameter(str(error), param_hint="--blocks") from error
            row = [f"{size or 'unlimited'}", policy, f"{result.hit_rate:.2%}", f"{result.saved_time:.2%}"]
            rows.append([*row, f"{result.lookups_per_second:.0f}"])
    click.echo(format_table(["blocks", "policy", "hit rate", "time saved", "lookups/s"], rows))


@command.command("kv-tiers")
@click.option("--shape", default="qwen2.5-0.5b", show_default=True, help="Dimensions of the random checkpoint.")
@click.option("--tokens", default=16_384, show_default=True, type=click.IntRange(256), help="Tokens of the prefix.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="CPU threads; 0 is every core.")
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1), help="Hits per tier; the median counts.")
def kv_tiers(shape: str, tokens: int, threads: int, runs: int) -> None:
    """The time to the first token of a long prompt: computed, and with its prefix in the pool, in DDR, in files."""
    from ..benchmarks.kv_tiers import measure_kv_tiers
    from ..benchmarks.measurement import format_table
    from ..benchmarks.workloads import SHAPES

    check_known("--shape", "shape", [shape], SHAPES)
    times = measure_kv_tiers(shape, tokens, threads, runs, lambda text: click.echo(text, err=True))
    rows = [
        [where, f"{seconds * 1000:.0f}", f"{times.recomputed / seconds:.1f}x"]
        for where, seconds in (
            ("computed", times.recomputed),
            ("HBM", times.hbm),
            ("DDR", times.ddr),
            ("NVME, after a restart", times.nvme),
        )
    ]
    click.echo(format_table(["prefix from", "TTFT ms", "faster"], rows))
    parts = f"lookup {times.lookup_s * 1000:.1f} ms, names {times.naming_s * 1000:.1f} ms"
    parts += f", saving what it displaces {times.saving_s * 1000:.0f} ms"
    click.echo(f"prefix: {tokens} tokens, {times.prefix_bytes / 2**20:.0f} MiB")
    click.echo(f"a miss costs {times.miss_share:.2%}: {parts}")
