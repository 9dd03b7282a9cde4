"""The whole standard pipeline on the null model, with operators of a test's own on any of its edges."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import numpy as np
import pytest
import trio
from trio.testing import MockClock

import sageLLM.operators  # noqa: F401 - registers the built-in stages
from sageLLM.accel.device_rates import DeviceRates
from sageLLM.accel.model_work import ModelDimensions
from sageLLM.accel.step_cost import StepCost
from sageLLM.errors import SageLLMError
from sageLLM.graph import build_pipeline, registry
from sageLLM.kv_runtime import block_hashes
from sageLLM.records import Completion, DeadLetter, Pooling, Request, SamplingParams, TokenDelta
from sageLLM.runtime.assembly import assemble
from sageLLM.runtime.flow.ledger import request_of
from sageLLM.runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Port, RecordKind, operator
from sageLLM.runtime.scheduler.lease import LeaseBook
from sageLLM.runtime.services import EngineServices

STAGES = ("tokenize", "kv_lookup", "schedule", "prefill", "kv_commit", "decode", "detokenize", "metrics")


class Feed(Operator[OperatorConfig]):
    """The test's requests, in lists of one to five, and a moment between them."""

    guarantee = "each once"
    outputs = (Port("out", frozenset({RecordKind.REQUEST})), ERROR_PORT)
    run_of: Run

    async def run(self, inlet, out):
        chance = random.Random(self.run_of.seed)
        while self.run_of.unsent:
            size = chance.randint(1, 5)
            some, self.run_of.unsent[:] = self.run_of.unsent[:size], self.run_of.unsent[size:]
            await out.send(some)
            await anyio.sleep(chance.choice((0, 0, 0.001)))


class Keep(Operator[OperatorConfig]):
    """Where results end."""

    guarantee = "each once"
    inputs = (Port("in"),)
    run_of: Run

    async def process(self, records, out):
        self.run_of.kept += records


class Watch(Keep):
    """Where KV events end."""

    async def process(self, records, out):
        self.run_of.events += records
        await anyio.sleep(self.run_of.watch_every_s)


class Fault(Operator[OperatorConfig]):
    """Passes records on, but for some: raises on them, drops, rejects, cancels or delays them."""

    guarantee = "none"
    inputs = (Port("in"),)
    outputs = (Port("out", same_as="in"), ERROR_PORT)
    run_of: Run

    async def process(self, records, out):
        for record in records:
            fault = self.run_of.next_fault(self.context.name)
            if fault == "raise":
                raise ValueError("the test says so")
            if fault == "raise after":
                await out.send([record])
                raise ValueError("the test says so")
            if fault == "cancel":
                self.context.engine.cancel([request_of(record)])
            elif fault == "delay":
                await anyio.sleep(0.01)
            if fault == "drop" and not isinstance(record, TokenDelta):
                self.run_of.dropped.append(request_of(record))
                out.drop([record])
            elif fault == "reject" and not isinstance(record, (TokenDelta, DeadLetter)):
                await out.reject([DeadLetter("the test says so", request=request_of(record))])
            else:
                await out.send([record])


@dataclass
class Run:
    """One run: what goes in, what is to go wrong, what came out."""

    requests: list[Request]
    engine: dict[str, Any] = field(default_factory=dict)
    operators: dict[str, dict[str, Any]] = field(default_factory=dict)  # settings of stages
    faults: dict[str, dict[str, float]] = field(default_factory=dict)  # after which stage, what, how often
    end: tuple[str, int] | None = None  # ("drain" or "abort", after how many turns of the event loop)
    max_restarts: int = 1000  # of an operator that makes faults
    seed: int = 0
    stages: tuple[str, ...] = STAGES
    backend: str = "trio"
    events: list[Any] | None = None  # [] to have decode's events kept here
    watch_every_s: float = 0
    unsent: list[Request] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    dropped: list[Any] = field(default_factory=list)
    error: SageLLMError | None = None

    def next_fault(self, node: str) -> str | None:
        chance = self._chance
        for fault, often in self.faults[node.removeprefix("after_")].items():
            if chance.random() < often:
                return fault
        return None

    def pipeline(self):
        chain = ["feed"]
        settings: dict[str, Any] = {"feed": {}}
        for stage in self.stages:
            settings[stage] = self.operators.get(stage, {})
            chain.append(stage)
            if stage in self.faults:
                settings[f"after_{stage}"] = {
                    "type": "fault",
                    "restart": {"max_restarts": self.max_restarts, "window_s": 0.01, "backoff_s": 0.001},
                }  # fmt: skip
                chain.append(f"after_{stage}")
        settings["keep"] = {}
        engine = {"model": {"model_id": "builtin:null"}, **self.engine}
        edges = [" -> ".join([*chain, "keep"]), "*.error -> keep"]
        if self.events is not None:
            settings["watch"] = self.operators.get("watch", {})
            edges.append("decode.events -> watch")
        return build_pipeline({"operators": settings, "edges": edges, "engine": engine})

    def __call__(self):
        """Run it; `error` is what `Flow.run` raised. No task, thread, lease or block may be left."""
        self.unsent = [*self.requests]
        self._chance = random.Random(self.seed)
        threads = set(threading.enumerate())
        with _registered(self), _interleaving(self.seed):
            options = {"clock": MockClock(autojump_threshold=0)} if self.backend == "trio" else {}
            anyio.run(self._main, backend=self.backend, backend_options=options)
        assert {thread for thread in threading.enumerate() if thread.name.startswith("sagellm")} <= threads
        self.check_nothing_leaks()
        return self

    async def _main(self):
        self.services = EngineServices(self.pipeline().engine)
        # The null model has none of its own.
        rates, shape = DeviceRates.from_specification(1e12, 1e10), ModelDimensions(4, 8, 2, 16, 128, 352, 1000)
        self.services.step_cost = StepCost(shape, rates)
        self.flow = assemble(self.pipeline(), self.services)
        try:
            # of virtual time, in which a run that hangs for ever is over at once
            with anyio.fail_after(300):
                await self._run()
        except SageLLMError as error:
            self.error = error

    async def _run(self):
        async with self.services.running(), anyio.create_task_group() as tasks:
            if self.end is not None:
                tasks.start_soon(self._end_it, *self.end)
            try:
                await self.flow.run()
            finally:
                tasks.cancel_scope.cancel()

    async def _end_it(self, how, turns):
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        getattr(self.flow, how)("the test says so")

    # -- what came out -------------------------------------------------------------------------------------------------

    @property
    def counts(self) -> dict[str, int]:
        return {name: count for name, count in self.flow.ledger.counters().items() if count}

    @property
    def completions(self) -> dict[str, Completion]:
        return {record.request_id: record for record in self.kept if isinstance(record, Completion)}

    @property
    def letters(self) -> dict[str, DeadLetter]:
        return {record.request_id: record for record in self.kept if isinstance(record, DeadLetter)}

    @property
    def tokens(self) -> dict[str, list[list[int]]]:
        return {name: [c.output_tokens for c in record.choices] for name, record in self.completions.items()}

    def check_nothing_leaks(self):
        """Laws 2 and 3: the counters add up, every lease and every block is back."""
        counters = self.flow.ledger.counters()
        assert counters["in_flight"] == 0
        assert counters["accepted"] == sum(counters[name] for name in ("done", "error", "cancelled", "shed"))
        services = self.services
        leases = services.leases
        assert services.worker.num_running == 0
        for book in [leases] if isinstance(leases, LeaseBook) else [*leases.prefill, *leases.decode]:
            assert book.free_slots == book.num_slots
            assert not book.any_in_transit
            assert not book._computing
            assert not book.load
            book.kv.check_integrity(owners=[])
            assert book.kv.available() == book.kv.num_blocks - book.kv.num_pinned
        assert not services.pins._reserved
        assert not services.pins._large
        for tiers in services.tiers:
            tiers.check_integrity()
        written = any(tiers.has_files for tiers in services.tiers)  # the end of the run moved all of it there
        if self.events is not None and self.error is None and not self.watch_every_s and not written:
            for worker, kv in enumerate(services.kv_caches):
                events = [event for event in self.events if event.worker == worker]
                assert cached_by_events(events) == cached_blocks(kv)

    def check_everyone_had_one_end(self):
        """Of a run that was not cut off: each request that went in came out once, and right if it was computed."""
        ends = [record.request_id for record in self.kept if not isinstance(record, TokenDelta)]
        ends += [request.request_id for request in self.dropped]
        assert len(ends) == len(set(ends))
        assert len(ends) == self.flow.ledger.accepted
        for completion in self.completions.values():
            pooled = completion.request.pooling is not None
            if pooled and completion.finish_reason == "stop":
                np.testing.assert_allclose(completion.embedding, null_embedding(completion.request), rtol=1e-6)
            for choice in completion.choices:
                assert choice.output_tokens == null_tokens(completion.prompt_length, len(choice.output_tokens))
                if choice.finish_reason == "length":
                    assert not pooled
                    assert len(choice.output_tokens) == completion.request.sampling.max_new_tokens


def cached_by_events(events):
    """The blocks that are cached in the end, by tenant and hash, as somebody knows who read every event."""
    cached = set()
    assert [event.seq for event in events] == [*range(len(events))]
    for event in events:
        if event.tier != "hbm":
            continue
        blocks = {(event.tenant, name) for name in event.block_hashes}
        if event.kind == "stored":
            assert not blocks & cached
            cached |= blocks
        elif event.kind == "removed":
            assert blocks <= cached
            cached -= blocks
        else:
            assert event.kind == "cleared"
            cached.clear()
    return cached


def cached_blocks(kv):
    """The full blocks of every prefix in the tree, by tenant and hash."""
    found = set()
    for node in kv._tree.nodes():
        (tenant, salt), tokens = node.prefix()
        found |= {(tenant, name) for name in block_hashes(tokens, kv.block_size, tenant, salt)}
    return found


def null_tokens(prompt_length, count):
    return [97 + (prompt_length + k) % 26 for k in range(count)]


def null_embedding(request):
    tokens = request.prompt_tokens if request.pooling is Pooling.MEAN else request.prompt_tokens[-1:]
    pooled = np.bincount(np.array(tokens) % 16, minlength=16)
    return pooled / np.linalg.norm(pooled)


@contextmanager
def _registered(run):
    registry.all_specs()  # registers the built-in operators for good
    known = registry._SPECS
    registry._SPECS = dict(known)
    try:
        for cls in (Feed, Keep, Watch, Fault):
            operator(cls.__name__.lower())(type(cls.__name__, (cls,), {"__doc__": cls.__doc__, "run_of": run}))
        yield
    finally:
        registry._SPECS = known


@contextmanager
def _interleaving(seed):
    """Which of the tasks that can run trio runs first."""
    core = trio._core._run
    before = core._ALLOW_DETERMINISTIC_SCHEDULING, core._r
    core._ALLOW_DETERMINISTIC_SCHEDULING, core._r = True, random.Random(seed)
    try:
        yield
    finally:
        core._ALLOW_DETERMINISTIC_SCHEDULING, core._r = before


def make_requests(count, seed=0, stream=False, pins=False):
    """Prompts of which many share a beginning, some two or three choices, one to twelve tokens each.

    Every sixth asks for an embedding, unless it streams.
    """
    chance = random.Random(seed)
    requests = []
    for number in range(count):
        prompt = [chance.choice((7, 8, 9))] * chance.choice((4, 9, 20)) + [number % 256] * chance.randint(1, 9)
        sampling = SamplingParams(max_new_tokens=chance.randint(1, 12), n=chance.choice((1, 1, 1, 2, 3)), temperature=0)
        request = Request(f"r{number}", prompt_tokens=prompt, sampling=sampling)
        request.stream = stream and chance.random() < 0.5
        request.pin = pins and chance.random() < 0.3
        request.unpin = pins and not request.pin and chance.random() < 0.3
        if number % 6 == 5 and not request.stream:
            request.sampling, request.pooling = SamplingParams(), Pooling.LAST if number % 12 == 5 else Pooling.MEAN
        requests.append(request)
    return requests


@pytest.fixture
def make_run():
    """`make_run(requests, ...)()` runs the standard pipeline; see Run."""
    return Run


@pytest.fixture(name="make_requests")
def make_requests_fixture():
    return make_requests


@pytest.fixture(scope="session")
def small_engine():
    """So little of everything that requests wait, are preempted, and share."""
    return {
        "kv_cache": {"max_tokens": 256, "block_size": 4},
        "scheduler": {"max_batch_size": 4, "max_step_tokens": 16, "max_prefill_batch": 2},
    }


NULL_YAML = """\
name: answers
vars: {input: in.jsonl, output: out.jsonl}
engine:
  model: {model_id: builtin:null}
operators:
  read: {type: jsonl_source, path: "${input}"}
  tokenize: {}
  kv_lookup: {}
  schedule: {}
  prefill: {}
  kv_commit: {}
  decode: {}
  detokenize: {}
  metrics: {path: metrics.prom}
  write: {type: jsonl_sink, path: "${output}"}
  dead: {type: jsonl_sink, path: dead.jsonl}
edges:
  - read -> tokenize -> kv_lookup -> schedule -> prefill -> kv_commit -> decode -> detokenize -> metrics -> write
  - "*.error -> dead"
"""


class Files:
    """A folder with answers.yaml: in.jsonl through the whole null pipeline to out.jsonl and dead.jsonl."""

    command = (sys.executable, "-c", "from sageLLM.cli.main import main; main()", "run", "answers.yaml", "--quiet")

    def __init__(self, folder):
        self.folder = folder
        (folder / "answers.yaml").write_text(NULL_YAML)

    def write(self, lines):
        (self.folder / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def read(self, name="out.jsonl"):
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def lines_in(self, name="out.jsonl"):
        return sorted(record["src"]["line"] for record in self.read(name))

    def computed(self):
        """How many requests the last run computed, as its metrics say."""
        text = (self.folder / "metrics.prom").read_text()
        found = re.findall(r"^sagellm:request_success_total\{.*\} (\d+)$", text, re.MULTILINE)
        return sum(map(int, found))

    def start(self, *arguments):
        return subprocess.Popen([*self.command, *arguments], cwd=self.folder, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments):
        """The exit code and stderr of `sagellm run`."""
        with self.start(*arguments) as process:
            _, stderr = process.communicate()
        return process.returncode, stderr


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)
