"""Drive one operator by hand: open, run on given lists, close; see what it sent and rejected."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest

from sageLLM.config import SageLLMConfig
from sageLLM.graph.pipeline import Edge
from sageLLM.records import (
    Choice,
    Completion,
    DeadLetter,
    FinishReason,
    Request,
    RequestMetrics,
    SamplingParams,
    Sequence,
    SourcePosition,
)
from sageLLM.runtime.flow.flow import Flow
from sageLLM.runtime.flow.ledger import Ledger
from sageLLM.runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, OperatorContext, Port
from sageLLM.runtime.flow.resume import ResumeIndex
from sageLLM.runtime.services import EngineServices

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class CollectingOutlet:
    """Keeps what an operator sends (`sent`), rejects (`letters`) and how it was grouped (`lists`)."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.letters: list[Any] = []
        self.lists: list[int] = []

    async def send(self, records, port="out"):
        await anyio.lowlevel.checkpoint()
        self.sent += records
        self.lists.append(len(records))

    async def reject(self, letters):
        self.letters += letters


@pytest.fixture
def outlet():
    return CollectingOutlet


@pytest.fixture
def make_context(tmp_path):
    """A context without an engine: `make_context(resume=..., drains=[...])`."""

    def make(base_dir: Path = tmp_path, resume: ResumeIndex | None = None, drains: list[str] | None = None):
        ask: Callable[[str], None] = (lambda reason: None) if drains is None else drains.append
        return OperatorContext("node", None, None, base_dir, ask, resume or ResumeIndex())  # type: ignore[arg-type]

    return make


@pytest.fixture(params=["asyncio", "trio"])
def loop_name(request):
    return request.param


@pytest.fixture
def drive(make_context, loop_name):
    """`drive(JsonlSource, {"path": ...}, inputs=[[...], ...])` -> the outlet, after open, run and close."""

    def run(cls: type[Operator[Any]], config: dict[str, Any], inputs=(), context=None, outlet=None) -> CollectingOutlet:
        collected = outlet or CollectingOutlet()

        async def live() -> None:
            node = cls(cls.config_model(**config), context or make_context())

            async def inlet():
                for records in inputs:
                    yield records

            await node.open()
            try:
                await node.run(inlet(), collected)
            finally:
                await node.close()

        anyio.run(live, backend=loop_name)
        return collected

    return run


@pytest.fixture
def make_completion():
    """A completion as detokenize sends it: `make_completion("q1", "four", line=3)`."""

    def make(request_id="q1", text="four", tokens=(4, 5), line=None, file="in.jsonl", fingerprint="f-9", **request):
        src = None if line is None else SourcePosition(file, line, line * 10, fingerprint)
        choice = Choice(0, list(tokens), text, FinishReason.STOP)
        metrics = RequestMetrics(queue_ms=1.0, ttft_ms=20.0, tpot_ms=5.0, e2e_ms=25.0, prefix_hit_tokens=2)
        return Completion(Request(request_id, prompt="2+2", src=src, **request), [choice], 3, metrics)

    return make


class Stage:
    """One operator while it runs: put records in, let it work, see what it has sent and rejected so far."""

    def __init__(self, operator, outlet) -> None:
        self.operator = operator
        self.outlet = outlet
        self.dropped: list[Any] = []
        outlet.drop = self.dropped.extend
        self.inlet, self._records = anyio.create_memory_object_stream(1000)
        self.taken = 0

    @property
    def sent(self) -> list[Any]:
        return self.outlet.sent

    @property
    def errors(self) -> list[str]:
        return [letter.error for letter in self.outlet.letters]

    async def put(self, *records) -> list[Any]:
        """Give it these as one list, wait until nothing moves any more, and return what it sent meanwhile."""
        before = len(self.sent)
        await self.inlet.send(list(records))
        await self.settled()
        return self.sent[before:]

    async def settled(self) -> None:
        for _ in range(100):
            await anyio.lowlevel.checkpoint()

    async def until(self, condition) -> None:
        """Wait for what takes real time."""
        for _ in range(5000):
            if condition():
                return
            await anyio.sleep(0.002)
        raise AssertionError("it never came true")

    async def _arrivals(self):
        async for records in self._records:
            self.taken += len(records)
            yield records

    async def live(self) -> None:
        with self.inlet, self._records:
            await self.operator.run(self._arrivals(), self.outlet)


class NullEngine:
    """The services of a pipeline on the null model, whose stages a test runs one by one."""

    def __init__(self, **config: Any) -> None:
        # one block is 4 tokens, so that short prompts fill several
        values = {"kv_cache": {"max_tokens": 256, "block_size": 4}, **config}
        self.services = EngineServices(SageLLMConfig.model_validate({"model": {"model_id": "builtin:null"}, **values}))
        self.context = OperatorContext("stage", self.services, None, None, lambda reason: None)  # type: ignore[arg-type]

    def sequence(self, prompt, max_new_tokens=4, stream=False, tenant="", salt="", interactive=False, **sampling):
        """What tokenize makes of a request with these token ids."""
        params = SamplingParams(max_new_tokens=max_new_tokens, **sampling).with_defaults(temperature=0.0)
        request = Request("r", prompt_tokens=list(prompt), sampling=params, stream=stream, tenant=tenant,
                          cache_salt=salt, interactive=interactive)  # fmt: skip
        return Sequence(request, np.asarray(prompt, np.int32), params)

    @asynccontextmanager
    async def stage(self, cls, **config):
        """Run one operator around the body; its inputs end with it."""
        stage = Stage(cls(cls.config_model(**config), self.context), CollectingOutlet())
        await stage.operator.open()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stage.live)
                yield stage
                stage.inlet.close()
        finally:
            await stage.operator.close()

    def check_nothing_leaks(self) -> None:
        services = self.services
        assert services.leases.free_slots == services.leases.num_slots
        assert not services.leases.any_in_transit
        assert services.worker.num_running == 0
        services.kv.check_integrity(owners=[])
        assert services.kv.available() == services.kv.num_blocks


@pytest.fixture
def null_engine():
    return NullEngine


@pytest.fixture
def plans_of(monkeypatch):
    """`plans_of(engine)` -> a list that gets every step's plan."""

    def record(engine):
        plans, executor = [], engine.services.executors[0]
        launch = executor.launch
        monkeypatch.setattr(executor, "launch", lambda plan: plans.append(plan) or launch(plan))
        return plans

    return record


@pytest.fixture
def on_loop(loop_name):
    """Run an async function with no arguments, on asyncio and on trio."""
    return lambda function: anyio.run(function, backend=loop_name)


class _Given(Operator[Any]):
    outputs = (Port("out"), ERROR_PORT)
    records: list[Any]

    async def run(self, inlet, out):
        for record in self.records:
            if isinstance(record, DeadLetter):
                await out.reject([record])
            else:
                await out.send([record])


class _Kept(Operator[Any]):
    inputs = (Port("in"),)
    records: list[Any]

    async def process(self, records, out):
        self.records += records


@pytest.fixture
def through(tmp_path, loop_name):
    """`through(Filter, {...}, records, ports=["out"])` -> (what came out by port, the ledger's counts), in a flow."""

    def run(cls: type[Operator[Any]], config: dict[str, Any], records: list[Any], ports=("out", "error")):
        ledger, kept = Ledger(), {port: [] for port in ports}

        def make(kind, name, config, records):
            operator = kind(config, OperatorContext(name, None, ledger, tmp_path, lambda reason: None))
            operator.records = records
            return operator

        factories = {"given": lambda: make(_Given, "given", OperatorConfig(), records)}
        factories["tested"] = lambda: make(cls, "tested", cls.config_model(**config), [])
        edges = [Edge("given", port, "tested", "in") for port in ("out", "error")]
        for number, port in enumerate(ports):
            name = f"{port}{number}"
            kept_here = kept[port] if port not in ports[:number] else kept.setdefault(name, [])
            factories[name] = partial(make, _Kept, name, OperatorConfig(), kept_here)
            edges.append(Edge("tested", port, name, "in"))
        anyio.run(Flow(factories, edges, ledger).run, backend=loop_name)
        ledger.check()
        return kept, {outcome: count for outcome, count in ledger.counters().items() if count}

    return run
