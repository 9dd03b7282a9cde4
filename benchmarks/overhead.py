"""`sagellm bench overhead`: the engine's own cost, as the whole pipeline on the null model, file to file."""

from __future__ import annotations

import json
import random
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from .stage_profiler import StageProfiler

if TYPE_CHECKING:
    from ..graph import Pipeline

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class OverheadReport:
    """`seconds` is from the start of the flow to its end; starting Python and building the services are not in it."""

    requests: int
    seconds: float
    profile: str | None

    columns = ("requests", "seconds", "requests/s", "tokens/s", "us/request")

    def row(self) -> list[str]:
        """The cells of a table, under `columns`."""
        cost = self.seconds / self.requests * 1e6
        rates = [f"{rate:.0f}" for rate in (self.requests_per_second, self.tokens_per_second, cost)]
        return [f"{self.requests}", f"{self.seconds:.2f}", *rates]

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.requests * OUTPUT_TOKENS / self.seconds


def measure_overhead(requests: int, batch: int, profile: bool = False) -> OverheadReport:
    """Run `requests` of 64 tokens in and 32 out through every stage; with `profile`, say where the time went."""
    with tempfile.TemporaryDirectory() as folder:
        _write_requests(Path(folder) / "in.jsonl", requests)
        pipeline = _build(Path(folder), batch)
        profiler = StageProfiler() if profile else None
        seconds = anyio.run(_run, pipeline, profiler)
        done = (Path(folder) / "out.jsonl").read_bytes().count(b"\n")
    if done != requests:
        raise RuntimeError(f"{done} of {requests} requests came out")
    return OverheadReport(requests, seconds, None if profiler is None else profiler.report(requests))


def _write_requests(path: Path, count: int) -> None:
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            prompt = [rng.randrange(256) for _ in range(PROMPT_TOKENS)]
            file.write(json.dumps({"prompt_tokens": prompt, "max_new_tokens": OUTPUT_TOKENS, "temperature": 0}) + "\n")


def _build(folder: Path, batch: int) -> Pipeline:
    source = {"type": "jsonl_source", "path": "in.jsonl", "on_error": "fail"}
    return build_null_pipeline(folder, batch, source, {"type": "jsonl_sink", "path": "out.jsonl", "fsync": "never"})


def build_null_pipeline(folder: Path, batch: int, source: dict[str, Any], sink: dict[str, Any]) -> Pipeline:
    """Every stage, on the null model, with room for `batch` requests at once and as many that wait."""
    from .. import operators  # noqa: F401 - registers the built-in stages
    from ..graph import build_pipeline

    stages = ["source", "tokenize", "kv_lookup", "schedule", "prefill", "kv_commit", "decode", "detokenize"]
    stages += ["metrics", "sink"]
    settings: dict[str, Any] = {stage: {} for stage in stages}
    settings |= {"source": source, "sink": sink}
    for stage in ("tokenize", "schedule", "prefill", "decode", "detokenize"):
        settings[stage] = {"on_error": "fail"}
    settings["schedule"]["max_waiting"] = 2 * batch
    scheduler = {"max_batch_size": batch, "max_prefill_batch": batch, "max_decode_batch": batch}
    scheduler |= {"max_step_tokens": batch * PROMPT_TOKENS}
    pool = {"max_tokens": batch * (PROMPT_TOKENS + OUTPUT_TOKENS) * 4}
    data = {
        "name": "overhead",
        "engine": {"model": {"model_id": "builtin:null"}, "scheduler": scheduler, "kv_cache": pool},
        "operators": settings,
        "edges": [" -> ".join(stages)],
    }
    return build_pipeline(data, base_dir=folder)


async def _run(pipeline: Pipeline, profiler: StageProfiler | None) -> float:
    from ..runtime.assembly import assemble
    from ..runtime.garbage import collect_rarely
    from ..runtime.services import EngineServices

    services = EngineServices(pipeline.engine)
    flow = assemble(pipeline, services)
    services.load()
    collect_rarely()
    async with services.running():
        with profiler or nullcontext():
            start = time.perf_counter()
            await flow.run()
            return time.perf_counter() - start
