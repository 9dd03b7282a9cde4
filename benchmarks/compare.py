"""`sagellm bench compare`: this engine against a peer, same checkpoint, same requests, same run, as ratios."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .checkpoints import write_checkpoint
from .contenders import PEERS, SageLLM
from .measurement import Measurement, format_table
from .workloads import Workload, build_workload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .contenders import Contender

# What others reached on a 2-core AMD Zen 5 machine with AVX512-bf16 (not this machine): TTFT ms and TPOT ms of
# cpu-single, output tokens/s of cpu-batch and cpu-prefix, requests/s of overhead.
PUBLISHED = {
    "transformers generate, bf16": ("895", "70.4", "69.6", "27.6", "257"),
    "llama.cpp bf16": ("838", "23.3", "82.6", "33", "221"),
    "llama.cpp q8_0": ("1399", "17.6", "55", "20", "270"),
    "OpenVINO bf16": ("477", "27.4", "160.5", "57.5", "361"),
    "OpenVINO int8": ("470", "17.7", "160.6", "62", "404"),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both measurements of one workload, and the share of requests whose greedy tokens were all the same."""

    ours: Measurement
    peer: Measurement
    same_tokens: float

    @property
    def speedup(self) -> float:
        """How many times faster the whole workload was."""
        return self.peer.seconds / self.ours.seconds


def compare(
    workloads: Sequence[str], peer: str, dtype: str, threads: int, runs: int, report: Callable[[str], None]
) -> list[Comparison]:
    """Run each workload on both engines, `runs` times each after a short warm-up, and keep the best.

    Raises:
        ConfigError: the peer, one of PEERS, is not installed.
    """
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in workloads:
            workload = build_workload(name)
            folder = Path(scratch) / workload.shape
            if not folder.exists():
                write_checkpoint(workload.shape, folder)
            measured = []
            for contender in (SageLLM, PEERS[peer]):
                report(f"{name}: {contender.name} ...")
                measured.append(_measure(contender, folder, workload, dtype, threads, runs))
            (ours, our_tokens), (theirs, their_tokens) = measured
            same = sum(a == b for a, b in zip(our_tokens, their_tokens, strict=True)) / len(our_tokens)
            results.append(Comparison(ours, theirs, same))
    return results


def _measure(
    contender: type[Contender], folder: Path, workload: Workload, dtype: str, threads: int, runs: int
) -> tuple[Measurement, list[list[int]]]:
    try:
        engine = contender(folder, dtype, threads)  # type: ignore[call-arg]
    except ModuleNotFoundError as error:
        raise ConfigError(f"peer {contender.name} is not installed: {error}") from error
    try:
        first = [(prompt[::-1][:32], 4) for prompt, _ in workload.requests]
        engine.run(Workload("warm-up", workload.shape, first))
        results = [engine.run(_varied(workload, i)) for i in range(runs)]
    finally:
        engine.close()
        gc.collect()
    # The tokens of the first run, whichever was the fastest: both engines are to be compared on the same prompts.
    return min((measured for measured, _ in results), key=lambda measured: measured.seconds), results[0][1]


def _varied(workload: Workload, run: int) -> Workload:
    """The same load with other tokens, so that no run finds the prompts of an earlier one in a prefix cache."""
    if not run:
        return workload
    requests = [([(token + run) % 4000 for token in prompt], length) for prompt, length in workload.requests]
    return Workload(workload.name, workload.shape, requests)


def format_comparison(results: list[Comparison]) -> str:
    """The ratio table, then what others are known to reach elsewhere."""
    header = ["workload", "engine", "seconds", "TTFT ms", "TPOT ms", "out tok/s", "req/s", "ratio", "same tokens"]
    rows = []
    for result in results:
        for one, ratio in ((result.ours, f"{result.speedup:.2f}x"), (result.peer, "1.00x")):
            rows.append(
                [
                    one.workload,
                    one.engine,
                    f"{one.seconds:.2f}",
                    "-" if one.ttft_ms is None else f"{one.ttft_ms:.0f}",
                    "-" if one.tpot_ms is None else f"{one.tpot_ms:.1f}",
                    f"{one.tokens_per_second:.1f}",
                    f"{one.requests_per_second:.1f}",
                    ratio,
                    f"{result.same_tokens:.0%}" if one is result.ours else "",
                ]
            )
    known = [[name, *figures] for name, figures in PUBLISHED.items()]
    columns = ["elsewhere: 2 cores, AVX512-bf16", "single TTFT ms", "TPOT ms", "batch tok/s", "prefix tok/s"]
    columns += ["overhead req/s"]
    note = "same tokens: weights are random, so in bfloat16 near ties are rounded apart; in float32 they are the same"
    return "\n\n".join((format_table(header, rows), note, format_table(columns, known)))
