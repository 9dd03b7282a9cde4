"""What it costs to wait: a blocking map in a SAGE stream beside SubmitRequests and Completions, and the other ways.

    pip install "sagellm[sage]"
    python examples/sage_throughput.py --requests 64 --tokens 32 2>/dev/null     # SAGE tells its progress there

Every way generates the same requests with one engine, which is warm. `steps` are the worker's: a step computes one
token of every request that runs, so the fewer steps there are, the fuller are their batches.
"""

from __future__ import annotations

import argparse
import threading
import time
from typing import Any

from sage.foundation import SinkFunction, SourceFunction
from sage.runtime import LocalEnvironment, StopSignal

from sageLLM.benchmarks.measurement import format_table
from sageLLM.integrations.sage import END, Completions, Generate, GenerateBatch, SubmitRequests
from sageLLM.integrations.sage.engines import find_handle


class Items(SourceFunction):
    def __init__(self, items: list[Any]) -> None:
        super().__init__()
        self._items = iter(items)

    def execute(self) -> Any:
        return next(self._items, StopSignal("items"))


class Count(SinkFunction):
    """Sets an event when `expected` outputs have come, alone or in lists."""

    def __init__(self, expected: int, done: threading.Event) -> None:
        super().__init__()
        self._left, self._done = expected, done

    def execute(self, data: Any) -> None:
        self._left -= len(data) if isinstance(data, list) else 1
        if self._left == 0:
            self._done.set()


def map_items(env: LocalEnvironment, prompts: list[str], arguments: dict[str, Any], sink: dict[str, Any]) -> None:
    env.from_source(Items, prompts, delay=0.01).map(Generate, **arguments).sink(Count, **sink)


def submit_items(env: LocalEnvironment, prompts: list[str], arguments: dict[str, Any], sink: dict[str, Any]) -> None:
    env.from_source(Items, [*prompts, END], delay=0.01).sink(SubmitRequests, **arguments)
    env.from_source(Completions, config=arguments["config"], delay=0.01).sink(Count, **sink)


def map_batch(env: LocalEnvironment, prompts: list[str], arguments: dict[str, Any], sink: dict[str, Any]) -> None:
    env.from_batch(prompts).map(Generate, **arguments).sink(Count, **sink)


def map_list(env: LocalEnvironment, prompts: list[str], arguments: dict[str, Any], sink: dict[str, Any]) -> None:
    env.from_source(Items, [prompts], delay=0.01).map(GenerateBatch, **arguments).sink(Count, **sink)


FLOWS = {  # how each is built, and whether it is submitted with autostop
    "stream, Generate": (map_items, False),
    "stream, SubmitRequests and Completions": (submit_items, False),
    "stream, GenerateBatch": (map_list, False),
    "autostop, Generate": (map_batch, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:pydoc-tiny")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="of each output")
    parser.add_argument("--runs", type=int, default=3, help="of each way, in turn; the best counts")
    given = parser.parse_args()
    config = {"model": {"model_id": given.model}, "kv_cache": {"enable_prefix_caching": False}}
    arguments = {"config": config, "options": {"max_tokens": given.tokens, "ignore_eos": True, "temperature": 0}}
    prompts = [f"question number {n}" for n in range(given.requests)]
    handle = find_handle(config)
    engine = handle.engine_for(handle)
    Generate(**arguments).execute("warm up")

    best: dict[str, tuple[float, int]] = {}
    for _ in range(given.runs):
        for name, (build, autostop) in FLOWS.items():
            env, done = LocalEnvironment("throughput"), threading.Event()
            build(env, prompts, arguments, {"expected": len(prompts), "done": done})
            steps, begin = engine.get_stats()["worker"]["steps"], time.perf_counter()
            env.submit(autostop=autostop)
            done.wait()
            seconds = time.perf_counter() - begin
            steps = engine.get_stats()["worker"]["steps"] - steps
            best[name] = min(best.get(name, (seconds, steps)), (seconds, steps))
            env.stop()
    slowest = best["stream, Generate"][0]
    rows = [
        [name, f"{seconds:.2f}", f"{given.requests / seconds:.1f}", f"{steps}", f"{slowest / seconds:.1f}x"]
        for name, (seconds, steps) in best.items()
    ]
    print(format_table(["flow", "seconds", "requests/s", "steps", "faster"], rows))


if __name__ == "__main__":
    main()
