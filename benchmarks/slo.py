"""What `scheduler.tpot_slo_ms` changes: chats decode while documents are read, on the real engine, with and without."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np

from ..config import SageLLMConfig
from ..engine import SageLLMEngine
from ..generation import GenerateRequest
from .checkpoints import write_checkpoint
from .measurement import format_table
from .workloads import SHAPES

if TYPE_CHECKING:
    from collections.abc import Callable

CHAT, DOCUMENT = "chats", "documents"


@dataclass(frozen=True, slots=True)
class MixedLoad:
    """Requests by the clock, whatever the engine makes of them. Rates are requests a second, sizes tokens."""

    seconds: float
    chats_per_s: float
    documents_per_s: float
    document_tokens: int
    chat_tokens: int = 64
    chat_outputs: int = 96
    document_outputs: int = 16

    def arrivals(self, vocab_size: int) -> list[tuple[float, str, list[int], int]]:
        """(seconds from the start, kind, prompt, outputs), evenly spaced, the same each time."""
        rng = np.random.default_rng(0)
        found: list[tuple[float, str, list[int], int]] = []
        for kind, rate, tokens, outputs in (
            (CHAT, self.chats_per_s, self.chat_tokens, self.chat_outputs),
            (DOCUMENT, self.documents_per_s, self.document_tokens, self.document_outputs),
        ):
            times = np.arange(0.5 / rate, self.seconds, 1 / rate).tolist()
            found += [(at, kind, rng.integers(0, vocab_size, tokens).tolist(), outputs) for at in times]
        return sorted(found)


@dataclass(slots=True)
class Latencies:
    """Of one kind of request, in seconds: to the first token, a token after it in the mean, and between tokens."""

    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)

    def add(self, sent: float, tokens: list[float]) -> None:
        """A request that was sent then, and whose tokens came then."""
        self.ttft.append(tokens[0] - sent)
        if len(tokens) > 1:
            self.tpot.append((tokens[-1] - tokens[0]) / (len(tokens) - 1))
            self.itl += [after - before for before, after in pairwise(tokens)]


@dataclass(slots=True)
class Served:
    """One run of the load."""

    slo_ms: float | None
    latencies: dict[str, Latencies]
    seconds: float
    tokens: int


def compare_slo(
    backend: dict[str, Any], shape: str, slo_ms: float, load: MixedLoad, runs: int, say: Callable[[str], None]
) -> list[Served]:
    """Run the load without and with the SLO, `runs` times in turn; each kind's latencies are of all its runs.

    Raises:
        ConfigError: there is no such device.
    """
    results = [Served(limit, {CHAT: Latencies(), DOCUMENT: Latencies()}, 0.0, 0) for limit in (None, slo_ms)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(shape, Path(scratch) / shape)
        for run in range(runs):
            for served in results:
                say(f"run {run + 1} of {runs}, " + ("no SLO" if served.slo_ms is None else f"SLO {served.slo_ms:g} ms"))
                with SageLLMEngine(_config(folder, backend, served.slo_ms)) as engine:
                    anyio.run(_serve, engine, load.arrivals(SHAPES[shape]["vocab_size"]), served)
    return results


def _config(folder: Path, backend: dict[str, Any], slo_ms: float | None) -> SageLLMConfig:
    return SageLLMConfig.model_validate(
        {
            "model": {"model_id": str(folder)},
            "backend": backend,
            "scheduler": {"tpot_slo_ms": slo_ms, "request_timeout_s": 0, "queue_timeout_s": 0},
        }
    )


async def _serve(engine: SageLLMEngine, arrivals: list[tuple[float, str, list[int], int]], served: Served) -> None:
    async def follow(kind: str, prompt: list[int], outputs: int) -> None:
        request = GenerateRequest(prompt_tokens=prompt, max_new_tokens=outputs, temperature=0.0, ignore_eos=True)
        sent = time.perf_counter()
        times = [time.perf_counter() async for _ in engine.generate_stream(request)]
        served.latencies[kind].add(sent, times)
        served.tokens += len(times)

    began = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for at, kind, prompt, outputs in arrivals:
            await anyio.sleep(max(0.0, began + at - time.perf_counter()))
            tasks.start_soon(follow, kind, prompt, outputs)
    served.seconds += time.perf_counter() - began


def format_served(results: list[Served]) -> str:
    """Latencies in milliseconds, by kind and with and without the SLO."""
    rows = []
    for kind in (CHAT, DOCUMENT):
        for served in results:
            name = f"{kind}, " + ("no SLO" if served.slo_ms is None else f"SLO {served.slo_ms:g} ms")
            cells = [f"{len(served.latencies[kind].ttft)}"]
            for seconds in (served.latencies[kind].ttft, served.latencies[kind].tpot, served.latencies[kind].itl):
                cells += [f"{1e3 * float(np.quantile(seconds, q)):.0f}" if seconds else "-" for q in (0.5, 0.99)]
            rows.append([name, *cells, f"{served.tokens / served.seconds:.1f}"])
    header = ["ms", "requests", "TTFT p50", "p99", "TPOT p50", "p99", "ITL p50", "p99", "all tokens/s"]
    return format_table(header, rows)
