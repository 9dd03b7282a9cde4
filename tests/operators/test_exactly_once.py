"""jsonl_source -> jsonl_sink is exactly-once: across kill -9, with results out of order, in bounded memory."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys

import anyio
import pytest

from sageLLM.errors import SourceChangedError
from sageLLM.graph.pipeline import Edge
from sageLLM.operators.sinks.jsonl_sink import JsonlSink
from sageLLM.operators.sources.jsonl_source import JsonlSource
from sageLLM.records import Choice, Completion, FinishReason
from sageLLM.runtime.flow.flow import Flow
from sageLLM.runtime.flow.ledger import Ledger
from sageLLM.runtime.flow.operator import Operator, OperatorConfig, OperatorContext, Port
from sageLLM.runtime.flow.resume import ResumeIndex


def complete(request):
    tokens = [len(request.prompt)]
    return Completion(request, [Choice(0, tokens, request.prompt.upper(), FinishReason.STOP)], 1)


class Shuffle(Operator[OperatorConfig]):
    """Stands for the whole pipeline: completes requests out of order, up to `window` of them held back."""

    inputs = (Port("in"),)
    outputs = (Port("out"),)
    seed: int | None = None
    window = 100
    drain_after: float = float("inf")
    computed = 0

    async def run(self, inlet, out):
        chance = None if self.seed is None else random.Random(self.seed)
        held = []
        async for requests in inlet:
            held += map(complete, requests)
            Shuffle.computed += len(requests)
            if Shuffle.computed > self.drain_after:
                self.context.request_drain("the test says so")
            if chance is not None:
                chance.shuffle(held)
            while len(held) > self.window:
                some = len(held) if chance is None else chance.randint(1, 20)
                batch, held = held[:some], held[some:]
                await out.send(batch)
        await out.send(held)


async def run_flow(folder, seed=None, drain_after=float("inf")):
    """in.jsonl -> out.jsonl, dead letters to dead.jsonl; returns how many requests were computed."""
    ledger, resume = Ledger(), ResumeIndex()

    def make(cls, name, **config):
        context = OperatorContext(name, None, ledger, folder, lambda reason: flow.drain(reason), resume)
        return lambda: cls(cls.config_model(**config), context)

    Shuffle.seed, Shuffle.drain_after, Shuffle.computed = seed, drain_after, 0
    factories = {
        "source": make(JsonlSource, "source", path="in.jsonl", batch_size=32),
        "shuffle": make(Shuffle, "shuffle", buffer=10),
        "done": make(JsonlSink, "done", path="out.jsonl", fsync="never"),
        "dead": make(JsonlSink, "dead", path="dead.jsonl", fsync="never"),
    }
    edges = [
        Edge("source", "out", "shuffle", "in"),
        Edge("shuffle", "out", "done", "in"),
        Edge("source", "error", "dead", "in"),
    ]
    flow = Flow(factories, edges, ledger)
    report = await flow.run()
    assert report.counters["in_flight"] == 0
    return Shuffle.computed


def write_input(path, lines, bad_every=10):
    with open(path, "w") as file:
        for number in range(1, lines + 1):
            file.write("nonsense\n" if number % bad_every == 0 else f'{{"prompt": "prompt {number}"}}\n')


def numbers(path):
    return [json.loads(line)["src"]["line"] for line in path.read_text().splitlines()]


def test_a_second_run_computes_nothing(tmp_path):
    write_input(tmp_path / "in.jsonl", 500)
    assert anyio.run(run_flow, tmp_path) == 450
    assert anyio.run(run_flow, tmp_path) == 0
    assert sorted(numbers(tmp_path / "out.jsonl") + numbers(tmp_path / "dead.jsonl")) == list(range(1, 501))


@pytest.mark.parametrize("loop_name", ["asyncio", "trio"])
def test_a_drained_run_ends_cleanly_and_the_next_one_does_the_rest(tmp_path, loop_name):
    write_input(tmp_path / "in.jsonl", 500)
    computed = anyio.run(run_flow, tmp_path, 7, 100, backend=loop_name)
    assert 100 < computed < 200
    assert computed + anyio.run(run_flow, tmp_path, 7, backend=loop_name) == 450
    assert sorted(numbers(tmp_path / "out.jsonl") + numbers(tmp_path / "dead.jsonl")) == list(range(1, 501))


def test_deleting_a_line_computes_it_again(tmp_path):
    write_input(tmp_path / "in.jsonl", 50)
    anyio.run(run_flow, tmp_path)
    output = tmp_path / "out.jsonl"
    output.write_text("".join(output.read_text().splitlines(keepends=True)[1:]))
    assert anyio.run(run_flow, tmp_path) == 1
    assert sorted(numbers(output)) == [n for n in range(1, 51) if n % 10]


def test_a_changed_input_is_refused_and_the_output_kept(tmp_path):
    write_input(tmp_path / "in.jsonl", 50)
    anyio.run(run_flow, tmp_path)
    before = (tmp_path / "out.jsonl").read_bytes()
    write_input(tmp_path / "in.jsonl", 51)
    with pytest.raises(SourceChangedError, match=r"since dead\.jsonl and out\.jsonl was begun from it"):
        anyio.run(run_flow, tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == before


PROLOGUE = """
import importlib.util, os, resource, signal, sys
import anyio
spec = importlib.util.spec_from_file_location("flow", sys.argv[1])
flow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flow)
from pathlib import Path
folder = Path(sys.argv[2])
"""

KILLED = """
budget, tear, real = 0, 0, os.write
def write(fd, data):
    global budget
    budget -= len(data)
    if budget < 0:  # die in the middle of this write, as a real kill may
        real(fd, data[: tear % len(data)])
        os.kill(os.getpid(), signal.SIGKILL)
    return real(fd, data)
os.write = write
for run in sys.argv[3:]:
    budget, tear = map(int, run.split(","))
    if (pid := os.fork()) == 0:  # what is imported is imported once
        anyio.run(flow.run_flow, folder, tear)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_kill_9_at_random_points_loses_and_doubles_nothing(tmp_path, seed):
    write_input(tmp_path / "in.jsonl", 3000)
    chance = random.Random(seed)
    runs = [f"{chance.randint(1000, 150_000)},{chance.randint(0, 10**6)}" for _ in range(4)] + [f"{10**9},0"]
    command = [sys.executable, "-c", PROLOGUE + KILLED, __file__, str(tmp_path), *runs]
    *ends, last = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert last == 0
    assert set(ends) <= {0, -signal.SIGKILL}
    assert ends.count(-signal.SIGKILL) >= 2
    done, dead = numbers(tmp_path / "out.jsonl"), numbers(tmp_path / "dead.jsonl")
    assert sorted(done) == [n for n in range(1, 3001) if n % 10]
    assert sorted(dead) == list(range(10, 3001, 10))
    assert done != sorted(done), "the test means nothing if results come in order"


MEASURED = """
def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def run(lines):
    flow.write_input(folder / "in.jsonl", lines)
    return anyio.run(flow.run_flow, folder)

run(2000)
for name in ("out.jsonl", "dead.jsonl"):
    (folder / name).unlink()
base = peak_mb()
computed = run(40_000)
first = peak_mb()
again = anyio.run(flow.run_flow, folder)
print(computed, first - base, again, peak_mb() - first)
"""


def test_40_000_lines_in_bounded_memory(tmp_path):
    command = [sys.executable, "-c", PROLOGUE + MEASURED, __file__, str(tmp_path)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    computed, growth_mb, computed_again, growth_again_mb = map(float, answer)
    assert (computed, computed_again) == (36_000, 0)
    assert os.path.getsize(tmp_path / "out.jsonl") > 10 * 2**20
    assert growth_mb < 6, "memory grew with the input"
    assert growth_again_mb < 3, "the index of finished lines grew with the output"


# Copies to several files


async def run_tee(folder, path="in.jsonl"):
    """in.jsonl -> a.jsonl and, from the same port, b.jsonl; returns how many requests were computed."""
    ledger = Ledger()
    edges = [Edge("source", "out", "shuffle", "in"), Edge("source", "error", "dead", "in")]
    edges += [Edge("shuffle", "out", name, "in") for name in ("a", "b")]
    resume = ResumeIndex(edges)

    def make(cls, name, **config):
        context = OperatorContext(name, None, ledger, folder, lambda reason: flow.drain(reason), resume)
        return lambda: cls(cls.config_model(**config), context)

    Shuffle.seed, Shuffle.drain_after, Shuffle.computed = None, float("inf"), 0
    factories = {
        "source": make(JsonlSource, "source", path=path),
        "shuffle": make(Shuffle, "shuffle"),
        **{name: make(JsonlSink, name, path=f"{name}.jsonl", fsync="never") for name in ("a", "b", "dead")},
    }
    flow = Flow(factories, edges, ledger)
    await flow.run()
    return Shuffle.computed


def test_a_copy_that_a_kill_kept_from_one_file_is_written_there_by_the_next_run_and_only_there(tmp_path):
    write_input(tmp_path / "in.jsonl", 100)
    anyio.run(run_tee, tmp_path)
    expected = {name: sorted(numbers(tmp_path / f"{name}.jsonl")) for name in ("a", "b", "dead")}
    assert expected["a"] == expected["b"] == [n for n in range(1, 101) if n % 10]
    for name, kept in (("a", 70), ("b", 40)):
        output = tmp_path / f"{name}.jsonl"
        output.write_text("".join(output.read_text().splitlines(keepends=True)[:kept]))
    (tmp_path / "in.jsonl").rename(tmp_path / "renamed.jsonl")
    assert anyio.run(run_tee, tmp_path, "./renamed.jsonl") == 50
    assert {name: sorted(numbers(tmp_path / f"{name}.jsonl")) for name in expected} == expected
    assert anyio.run(run_tee, tmp_path, "renamed.jsonl") == 0


def test_which_lines_are_finished_follows_ports_and_edges():
    """One of the ports, all of its edges; what leads to no file does not count."""

    def finished(edges, **outputs):
        index = ResumeIndex(Edge(*edge.replace(".", " ").split(), "in") for edge in edges)
        for name, lines in outputs.items():
            written = ResumeIndex()
            for line in lines:
                written.entry("in", "f").lines.add(line)
            index.publish(written, name)
        lines = index.lines_finished("source", ["in"], "f")
        return [line for line in range(10) if line in lines]

    assert finished([], a=[1], b=[2]) == [1, 2]
    assert finished(["source.out a"], a=[1, 2]) == [1, 2]
    assert finished(["source.out tee", "tee.out a", "tee.out b"], a=[1, 2, 3], b=[2, 4]) == [2]
    assert finished(["source.out filter", "filter.out a", "filter.rest b"], a=[1, 2], b=[3]) == [1, 2, 3]
    assert finished(["source.out tee", "tee.out a", "tee.out screen", "source.error dead"], a=[1], dead=[2]) == [1, 2]
    diamond = ["source.out tee", "tee.out x", "tee.out y", "x.out a", "y.out a", "y.error dead"]
    assert finished(diamond, a=[1, 2], dead=[2, 3]) == [1, 2]
